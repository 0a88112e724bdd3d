"""Peaks by others, in GiB: a fake-tensor trace of Qwen2.5's training step, for the trace and the closed form to meet.

NF4 with double quantisation, 16-bit embedding and head, r 16 on all linears, fp32 adapters and AdamW, checkpointing,
one row, all labelled, dropout 0. The closed form's activation terms were fitted
to these, its weights and optimizer were not.
"""

CASES = ((512, "chunked"), (2048, "chunked"), (512, "full"), (2048, "full"))  # tokens, train.logits
TRACED = {
    "0.5B": (0.98, 1.06, 1.56, 4.68),
    "1.5B": (1.75, 1.90, 2.33, 5.51),
    "3B": (2.76, 3.01, 3.34, 6.61),
    "7B": (6.16, 6.82, 6.74, 10.1),
    "14B": (10.7, 11.8, 11.3, 15.1),
    "32B": (20.4, 21.9, 20.7, 24.8),
}
