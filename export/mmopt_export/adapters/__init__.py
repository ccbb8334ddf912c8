"""Adapters: merged into the weights, or kept beside the graph as inputs that are swapped.

spec.py     an adapter and its weight, as the caller names it
fit.py      what an adapter folder holds, and whether a base has what it was trained on
attach.py   a PEFT adapter onto its base
merge.py    one or several adapters into the weights, in fp32
swap.py     LoRA layers whose A and B are inputs of the graph
files.py    `.onnx_adapter` files, their values for a run, a batch's rows by adapter; no torch
"""
