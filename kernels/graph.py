"""A function as a CUDA graph: its launches are recorded once and replayed as one.

A picture has few tokens: the host takes three times as long to launch a step's 700 kernels as the card to run them.
A replay launches them all at once, to the same bits. KIWI_GRAPH=1 in the environment of any command turns it on.
"""

import os

import torch


def replayed(function, x, t):
    """function(x, t) -> tensor, recorded on tensors shaped as x and t; whatever else it reads must stay in place.

    -> a function of tensors of the same shapes. On a CPU, or without KIWI_GRAPH=1, `function` itself.
    """
    if not x.is_cuda or os.environ.get("KIWI_GRAPH") != "1":
        return function
    x, t = x.clone(), t.clone()
    with torch.cuda.device(x.device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled, timed or allocated once happens here
            for _ in range(2):
                function(x, t)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(x, t)

    def replay(new_x, new_t):
        x.copy_(new_x)
        t.copy_(new_t)
        with torch.cuda.device(x.device):
            graph.replay()
        return out.clone()

    return replay
