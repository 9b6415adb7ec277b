"""KubeRay's CRD of a RayService (ray.io/v1) as a JSON schema, as far as we use it or might.

After ray-project/kuberay at 02a80a6f2abf, helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml.
A field that is not here is unknown; ANY: Kubernetes' own types, which are checked apart.
"""

ANY: dict = {}
TEXT, WHOLE, YES_NO = ({"type": kind} for kind in ("string", "integer", "boolean"))
INT32 = WHOLE | {"minimum": -(2**31), "maximum": 2**31 - 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}  # a number here is rejected, as is a bool


def one_of(*values: str) -> dict:
    """One of these texts."""
    return TEXT | {"enum": [*values]}


def fields(required: str = "", **known: dict) -> dict:
    """An object of these fields and no others; `required` names some of them."""
    return {
        "type": "object",
        "properties": known,
        "required": required.split(),
        "additionalProperties": False,
    }


_FROM = fields("key", key=TEXT, name=TEXT, optional=YES_NO)
_CREDENTIAL = fields(value=TEXT, valueFrom=fields(secretKeyRef=_FROM, configMapKeyRef=_FROM))
# Of the template's metadata the CRD keeps these five: anything else is an unknown field.
_METADATA = fields(labels=TEXTS, annotations=TEXTS, finalizers=ANY, name=TEXT, namespace=TEXT)
_TEMPLATE = fields(metadata=_METADATA, spec={"type": "object", "required": ["containers"]})
_GROUP = dict(rayStartParams=TEXTS, template=_TEMPLATE, resources=TEXTS, labels=TEXTS)
_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode=one_of("disabled", "token"), secretName=TEXT),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=fields(
        version=one_of("v1", "v2"),
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=INT32,
        image=TEXT,
        imagePullPolicy=TEXT,
        **dict.fromkeys(("env", "envFrom", "resources", "securityContext", "volumeMounts"), ANY),
    ),
    gcsFaultToleranceOptions=fields(
        redisAddress=TEXT,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=TEXT,
    ),
    headServiceAnnotations=TEXTS,
    headGroupSpec=fields(
        "template", serviceType=TEXT, headService=ANY, enableIngress=YES_NO, **_GROUP
    ),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            "groupName minReplicas maxReplicas template",
            groupName=TEXT,
            **dict.fromkeys(("replicas", "minReplicas", "maxReplicas", "numOfHosts"), INT32),
            idleTimeoutSeconds=INT32,
            suspend=YES_NO,
            scaleStrategy=fields(workersToDelete={"type": "array", "items": TEXT}),
            **_GROUP,
        ),
    },
    suspend=YES_NO,
)
RAYSERVICE = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=ANY,
    spec=fields(
        "rayClusterConfig",
        rayClusterConfig=_CLUSTER,
        serveConfigV2=TEXT,
        serveService=ANY,
        excludeHeadPodFromServeSvc=YES_NO,
        upgradeStrategy=fields(type=TEXT),
        rayClusterDeletionDelaySeconds=INT32 | {"minimum": 0},
    ),
)


def rejected(document: dict) -> list[str]:
    """What the operator rejects although the CRD lets it through, and what could not run.

    After ray-operator/controllers/ray/utils/validation.go, common/pod.go and common/service.go at
    the same commit.
    """
    cluster, name = document["spec"]["rayClusterConfig"], document["metadata"]["name"]
    head, workers = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
    node = head["template"]["spec"]["containers"][0]
    env = {variable["name"] for variable in node.get("env", [])}
    autoscaling, options = cluster.get("enableInTreeAutoscaling"), cluster.get("autoscalerOptions")
    redis = cluster.get("gcsFaultToleranceOptions")
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split(".")[:2])
    wrong = {
        "a name of more than 47 characters": len(name) > 47,
        "a token needs Ray 2.52": cluster.get("authOptions", {}).get("mode") == "token"
        and version < (2, 52),
        "Redis has no address": redis is not None and not redis.get("redisAddress"),
        "Redis twice, in the environment too": redis is not None
        and bool(env & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}),
        "Redis twice, in rayStartParams too": redis is not None
        and "redis-password" in head.get("rayStartParams", {}),
        "Redis' user name outside of gcsFaultToleranceOptions": "REDIS_USERNAME" in env
        or "redis-username" in head.get("rayStartParams", {}),
        "the autoscaler's version twice": bool(autoscaling and (options or {}).get("version"))
        and "RAY_enable_autoscaler_v2" in env,
        # KubeRay makes Services of the ports that are named; where none is, of its defaults.
        "the head's ports lack `serve` or `dashboard`": bool(node.get("ports"))
        and not {"serve", "dashboard"} <= {port.get("name") for port in node["ports"]},
    }
    for group in [{"groupName": "head"} | head, *workers]:
        at, params = group["groupName"], group.get("rayStartParams", {})
        spec = group["template"]["spec"]
        # Where none is given KubeRay adds --metrics-export-port=8080, and a pod shares its ports.
        mine = {int(params.get("metrics-export-port", 8080))}
        mine |= {int(params.get("dashboard-agent-listen-port", 52365))}
        others = {p["containerPort"] for c in spec["containers"][1:] for p in c.get("ports", [])}
        resources = {"num-cpus", "num-gpus", "memory", "resources"} & params.keys()
        wrong |= {
            f"{at}: labels in rayStartParams": "labels" in params,
            f"{at}: resources twice": bool(resources and group.get("resources")),
            f"{at}: Ray's own port in another container: {mine & others}": bool(mine & others),
            f"{at}: minReplicas above maxReplicas": group.get("minReplicas", 0)
            > group.get("maxReplicas", 2**31),
            f"{at}: suspended beside the autoscaler": bool(autoscaling and group.get("suspend")),
            f"{at}: a restartPolicy beside autoscaler v2": bool(autoscaling)
            and (options or {}).get("version") == "v2"
            and spec.get("restartPolicy", "Never") != "Never",
        }
    return [what for what, is_so in wrong.items() if is_so]
