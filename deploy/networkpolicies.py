"""Who may call whom: nobody, but for what is listed here."""

from kubernetes.client import (
    V1LabelSelector,
    V1LabelSelectorRequirement,
    V1NetworkPolicy,
    V1NetworkPolicyIngressRule,
    V1NetworkPolicyPeer,
    V1NetworkPolicyPort,
    V1NetworkPolicySpec,
)

from deploy import pods
from deploy.settings import GRPC, HTTP, MODEL, Settings

CLUSTER = ("head", "worker", "front")  # the parts that are nodes of the RayService's cluster


def _parts(*parts: str) -> V1LabelSelector:
    """Our pods of these parts."""
    among = V1LabelSelectorRequirement(key="part", operator="In", values=[*parts])
    return V1LabelSelector(match_labels=pods.labels(), match_expressions=[among])


def _namespace(name: str) -> V1NetworkPolicyPeer:
    """Every pod of a namespace."""
    label = {"kubernetes.io/metadata.name": name}
    return V1NetworkPolicyPeer(namespace_selector=V1LabelSelector(match_labels=label))


def _pods(selector: V1LabelSelector) -> V1NetworkPolicyPeer:
    return V1NetworkPolicyPeer(pod_selector=selector)


def _policy(name: str, settings: Settings, to: V1LabelSelector, peers=(), ports=()) -> dict:
    """Let `peers` call `ports` of the pods `to`; without ports all, without peers nobody."""
    rule = V1NetworkPolicyIngressRule(
        _from=[*peers],
        ports=[V1NetworkPolicyPort(port=port, protocol="TCP") for port in ports] or None,
    )
    return pods.plain(
        V1NetworkPolicy(
            api_version="networking.k8s.io/v1",
            kind="NetworkPolicy",
            metadata=pods.metadata(f"{MODEL}-{name}", settings),
            spec=V1NetworkPolicySpec(
                pod_selector=to, policy_types=["Ingress"], ingress=[rule] if peers else []
            ),
        )
    )


def documents(settings: Settings) -> list[dict]:
    """The policies of all our pods. The kubelet's probes pass in any case."""
    everyone_here = _pods(V1LabelSelector())
    gateway = _namespace(settings.gateway_namespace)
    operator = _namespace(settings.operator_namespace)
    of_ours = V1LabelSelector(match_labels=pods.labels())
    return [
        _policy("nobody", settings, of_ours),
        _policy(
            "requests",
            settings,
            _parts("server", "front"),
            [everyone_here, gateway],
            [HTTP, GRPC],
        ),
        _policy("ray", settings, _parts(*CLUSTER), [_pods(_parts(*CLUSTER))]),
        _policy("dashboard", settings, _parts("head"), [operator], [8265]),
        _policy("redis", settings, _parts("redis"), [_pods(_parts("head"))], [6379]),
    ]
