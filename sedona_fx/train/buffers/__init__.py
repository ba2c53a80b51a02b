"""What schedules keep between steps: buffers of activations, stashed weights, batches in flight.

Files

codec             Codecs: how buffered activations are compressed
in_flight         Batches in flight: what blocks keep of a batch between its forward pass and its delayed backward
                  pass
replay_buffer     The buffer between two blocks of ``Replay``: a ring of batches on the buffer's device, compressed
                  if asked for
ring              The ring of batches between two blocks of ``Replay``, and the rule by which the next block takes
                  from it
vector_quantizer  Vector quantisation of buffered activations, with a codebook that is learned while they are
                  encoded
weight_stash      Run a block on other tensors than its own: on copies of its parameters, or on temporary buffers
"""

__all__: list[str] = []  # internal
