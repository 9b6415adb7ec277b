"""What queueing theory says of systems without batches; tests compare the simulation with it."""


def erlang_b(servers: int, load: float) -> float:
    """Share of requests rejected by servers without a queue. load: rate x service time."""
    share = 1.0
    for n in range(1, servers + 1):
        share = load * share / (n + load * share)
    return share


def erlang_c(servers: int, load: float) -> float:
    """Share of requests that wait (M/M/c), for service time / (servers - load) on average."""
    if load >= servers:
        return 1.0
    rejected = erlang_b(servers, load)
    return rejected / (1 - load / servers * (1 - rejected))
