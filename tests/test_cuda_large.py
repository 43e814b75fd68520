"""Keys of more elements than 32 bits count: each row of a large batch gives what it gives alone.

Needs a CUDA GPU with 40 GB free.
"""

import pytest
import torch

import kvpitfalls as kvp
from kvpitfalls import ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 40 << 30, reason="needs a CUDA GPU with 40 GB free"
)


def rows(n_row, n_head, n_token, n_dim, is_transposed):
    """Random rows that differ, in bfloat16, laid out by heads or, as models hold them, by tokens."""
    shape = (n_row, n_token, n_head, n_dim) if is_transposed else (n_row, n_head, n_token, n_dim)
    keys = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    keys = keys.transpose(1, 2) if is_transposed else keys
    generator = torch.Generator("cuda").manual_seed(0)
    first = torch.randn(n_head, n_token, n_dim, dtype=torch.bfloat16, device="cuda", generator=generator)
    for b in range(n_row):
        keys[b] = first.roll(37 * b, 1)
    return keys


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(33, 8, 131072, 128), (1, 1, 2**23 - 5, 520)], ids=["rows", "tokens"])
@pytest.mark.parametrize("policy", ["knorm", "keydiff", "snapkv", "tova", "streaming_llm"])
def test_a_row_of_a_large_batch_is_scored_and_gathered_as_alone(policy, shape, is_transposed):
    keys = rows(*shape, is_transposed)
    assert keys.numel() > 2**32
    queries = rows(shape[0], shape[1], 64, shape[3], False) if policy in ("snapkv", "tova") else None
    kept = kvp.keep(policy, keys, queries, compression_ratio=0.5)
    gathered, _ = ops.gather(keys, keys, kept.positions)
    for b in {0, shape[0] - 1}:
        alone = keys[b : b + 1].clone()
        own = kvp.keep(policy, alone, None if queries is None else queries[b : b + 1].clone(), compression_ratio=0.5)
        assert torch.equal(kept.scores[b], own.scores[0])
        assert torch.equal(kept.positions[b], own.positions[0])
        index = own.positions[0].long()[..., None].expand(-1, -1, shape[3])
        assert torch.equal(gathered[b], alone[0].gather(1, index))
