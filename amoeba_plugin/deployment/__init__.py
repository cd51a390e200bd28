"""From a subnet to the engine that runs it: what an engine can load, what it costs there.

In: a subnet's configuration, or the subnet. Out: whether a target loads it, with the rule and
its source; measured latency.
"""
