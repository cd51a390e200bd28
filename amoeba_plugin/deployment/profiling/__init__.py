"""What shapes cost on this machine, by flow: measured for a few of a space, predicted for the others.

In: a model's configuration (weights are random: time does not depend on them), a space of shapes, flows. Out: a
`Profile`, a JSON file that a second run extends, and a model of time, memory and bytes with intervals.
"""
