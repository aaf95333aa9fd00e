"""The formulas of trivet plan: bytes held, operations, bytes moved and sent, for one device and one
step.

A formula is a pure function with a single return expression. `Term.text` reads that expression from
the source and puts the numbers in, so `trivet plan --formulas` prints exactly what was computed.
The recipes, the forward pass, the engine and the sharding determine them (docs/plan.md).

ranks: devices that share the weights (FSDP2). size: bytes of a number in matrix products (4 for
float32, 2 for bfloat16). tokens: tokens of one microbatch, counting a shared prompt once. learned:
completion tokens among them. queries, keys, pairs: of attention's padded rows.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

# A number with its formula
# ------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """The value of a formula, with the formula and the numbers put in."""

    value: float
    formula: Callable[..., float]
    numbers: dict[str, float]

    def text(self) -> str:
        """name = expression = expression with numbers, read from the code that computed it."""
        expression = _return_expression(self.formula)
        numbers = {name: _digits(value) for name, value in self.numbers.items()}
        filled = ast.unparse(_Substitute(numbers).visit(ast.parse(expression, mode="eval")))
        return f"{self.formula.__name__} = {expression} = {filled.replace(chr(39), '')}"


def term(formula: Callable[..., float], **numbers: float) -> Term:
    """Evaluate a formula at these numbers."""
    return Term(formula(**numbers), formula, numbers)


@cache
def _return_expression(formula: Callable[..., float]) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(formula)))
    returned = next(node for node in ast.walk(tree) if isinstance(node, ast.Return))
    return ast.unparse(returned.value)  # type: ignore[arg-type]


class _Substitute(ast.NodeTransformer):
    def __init__(self, numbers: dict[str, str]):
        self.numbers = numbers

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.numbers[node.id]) if node.id in self.numbers else node


def _digits(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:.3g}"


# Memory
# ------------------------------------------------------------------------------------------------


def program(measured: float) -> float:
    """Memory of the process before a model is loaded: its libraries; on a GPU, their context
    there.
    """
    return measured


def weights(parameters: float, ranks: float) -> float:
    """Weights in float32."""
    return 4 * parameters / ranks


def quantized_weights(parameters: float, matrices: float, bits: float) -> float:
    """A frozen base with its matrices in few bits, plus a float32 scale for every 64 weights."""
    return 4 * (parameters - matrices) + matrices * (bits / 8 + 4 / 64)


def gradients(trained: float, ranks: float) -> float:
    """A float32 gradient for every trained parameter."""
    return 4 * trained / ranks


def adam(trained: float, ranks: float) -> float:
    """Two float32 moments for every trained parameter."""
    return 8 * trained / ranks


def casts(matrices: float) -> float:
    """The bfloat16 copies of matrices: of the current block if there are gradients, else of the
    whole pass.
    """
    return 2 * matrices


def head_cast(head: float) -> float:
    """The bfloat16 copy of the head, kept until the weights change; the policy and the reference
    have one each.
    """
    return 2 * head


def gathered_weights(block: float, root: float, size: float) -> float:
    """Weights gathered from all ranks: the current block and the next one, in the products' dtype;
    the root (embedding, head, last norm) in float32, throughout a pass.
    """
    return size * 2 * block + 4 * root


def gathered_model(parameters: float, root: float, size: float) -> float:
    """All weights, gathered on every rank for sampling: blocks in the products' dtype, the root in
    float32.
    """
    return size * (parameters - root) + 4 * root


def block_gradients(block: float, root: float, size: float) -> float:
    """A block's gradient as computed and in float32, to be summed over the ranks and divided; the
    root's is kept until the end.
    """
    return (size + 4) * block + 4 * root


def activations(tokens: float, inputs: float, norms: float, size: float) -> float:
    """Activations the trunk keeps for its backward pass, in the products' dtype: the inputs of its
    matrices (a shared input once) and the feed-forward's gate and up; in float32: the inputs of
    norms. A model that model/lean.py does not support keeps more.
    """
    return tokens * (size * inputs + 4 * norms)


def expert_activations(
    tokens: float, expert_inputs: float, expert_gates: float, size: float
) -> float:
    """The same for a token's experts; on one device in float32, since autocast does not cover their
    grouped products.
    """
    return tokens * size * (expert_inputs + 3 * expert_gates)


def attention_activations(
    layers: float, heads: float, kv_heads: float, key_width: float, value_width: float,
    queries: float, keys: float, pairs: float, size: float,
) -> float:  # fmt: skip
    """On a CPU: the queries, keys and values of the padded rows, and the probabilities."""
    return (
        layers
        * size
        * (
            heads * key_width * queries
            + kv_heads * (key_width + value_width) * keys
            + heads * pairs
        )
    )


def fused_attention_activations(
    layers: float, heads: float, kv_heads: float, key_width: float, value_width: float,
    queries: float, keys: float, size: float,
) -> float:  # fmt: skip
    """With a fused kernel: queries, keys, values and the output, but no probabilities."""
    return (
        layers
        * size
        * (
            heads * (key_width + value_width) * queries
            + kv_heads * (key_width + value_width) * keys
        )
    )


def checkpointed_activations(tokens: float, hidden: float, layers: float, kept: float) -> float:
    """With gradient checkpointing: every block's float32 input, and one block's activations."""
    return 4 * tokens * hidden * layers + kept / layers


def adapter_activations(tokens: float, rank: float, adapters: float, size: float) -> float:
    """The inner states of the adapters: `rank` numbers for every matrix."""
    return tokens * rank * adapters * size


def kept_logits(learned: float, columns: float, size: float) -> float:
    """Logits kept for the backward pass: as many columns of the vocabulary as 128 MiB hold; the
    others are recomputed.
    """
    return learned * columns * size


def head_buffers(learned: float, hidden: float, chunk: float, size: float) -> float:
    """During the head's backward pass: a chunk of logits in float32 and in the products' dtype, and
    the gradients of the states twice.
    """
    return chunk * (4 + size) + learned * hidden * (8 + 2 * size)


def head_gradient(head: float) -> float:
    """The head's gradient in transit: a tied one waits until the embedding's is computed too."""
    return 4 * head


def tied_gradients(head: float) -> float:
    """At the end of the backward pass: the embedding's own gradient, and the one that came through
    the head.
    """
    return 8 * head


def block_backward(tokens: float, hidden: float, widest: float, size: float) -> float:
    """Gradients inside one block: of its residual stream and of the feed-forward's three states."""
    return tokens * (16 * hidden + 3 * size * widest)


def forward_activations(tokens: float, hidden: float, widest: float, size: float) -> float:
    """A pass without gradients: the residual stream, a norm and the feed-forward's states of one
    block.
    """
    return tokens * (16 * hidden + 3 * size * widest)


def cache_bytes(
    rows: float,
    columns: float,
    layers: float,
    kv_heads: float,
    key_width: float,
    value_width: float,
    size: float,
) -> float:
    """Keys and values of every row being sampled; columns grow in steps of 64."""
    return rows * columns * layers * kv_heads * (key_width + value_width) * size


def server_weights(parameters: float, servers: float) -> float:
    """Weights in bfloat16, divided among the servers."""
    return 2 * parameters / servers


def server_cache(
    rows: float, columns: float, layers: float, numbers: float, servers: float
) -> float:
    """Keys and values of all rows in bfloat16, divided among the servers. numbers: how many per
    token and layer.
    """
    return 2 * rows * columns * layers * numbers / servers


def sampling(rows: float, vocabulary: float, size: float) -> float:
    """Logits of the next token of every row: as the product computed them, in float32, their
    exponentials, and these padded.
    """
    return rows * vocabulary * (size + 12)


def kept_by_allocator(working: float, share: float) -> float:
    """What malloc (or a GPU's allocator, in fragments) holds beyond live tensors: a share of all
    memory allocated and freed in a step.
    """
    return share * working


# Formulas: floating-point operations of one device and step
# --------------------------------------------------------------


def matrix_flops(active: float, tokens: float) -> float:
    """Products with the trunk's matrices: one multiplication and one addition per parameter and
    token.
    """
    return 2 * active * tokens


def attention_flops(
    layers: float, heads: float, key_width: float, value_width: float, pairs: float
) -> float:
    """Scores and their product with the values, for every pair of a query and a key in the padded
    rows (including masked ones).
    """
    return 2 * layers * heads * (key_width + value_width) * pairs


def head_flops(head: float, learned: float) -> float:
    """Logits at the positions that predict a completion token."""
    return 2 * head * learned


def backward_flops(forward: float, factors: float, again: float) -> float:
    """The gradient of each factor of a product costs as much as the product: both factors, or only
    the states if the matrix is frozen. again: operations that are recomputed.
    """
    return factors * forward + again


def logits_again(learned: float, hidden: float, columns: float) -> float:
    """Logits that were not kept for the backward pass: this many columns of the vocabulary."""
    return 2 * learned * hidden * columns


def adapter_flops(adapters: float, tokens: float) -> float:
    """Products with the two factors of every adapter."""
    return 2 * adapters * tokens


def adamw_flops(trained: float) -> float:
    """AdamW and gradient clipping: about 20 operations per parameter."""
    return 20 * trained


# Formulas: bytes moved to and from memory, of one device and step
# ---------------------------------------------------------


def forward_bytes(microbatches: float, matrices: float, kept: float, size: float) -> float:
    """Matrices are read for each microbatch (in bfloat16: read, written and read again), and
    activations are written.
    """
    return microbatches * matrices * (12 - 2 * size) + kept


def backward_bytes(microbatches: float, matrices: float, kept: float, size: float) -> float:
    """For each microbatch, matrices are read, and their gradients read and written; activations are
    read, and their gradients written.
    """
    return microbatches * matrices * (size + 8) + 2 * kept


def touched_experts(experts: float, share: float, rows: float) -> float:
    """Parameters of the experts that at least one of these rows uses, if each row uses this share
    of them at random.
    """
    return experts * (1 - (1 - share) ** rows)


def decode_bytes(steps: float, matrices: float, cache: float, size: float) -> float:
    """Every decoding step reads the cache and all matrices that any row needs."""
    return steps * (size * matrices + cache)


def adamw_bytes(trained: float, ranks: float) -> float:
    """The parameter, its gradient and two moments are read, three of them written; the gradient is
    also read and scaled for clipping.
    """
    return 40 * trained / ranks


def gather_bytes(passes: float, parameters: float, ranks: float, size: float) -> float:
    """Weights received from the other ranks, for every pass over them."""
    return passes * size * parameters * (ranks - 1) / ranks


def scatter_bytes(passes: float, trained: float, ranks: float) -> float:
    """Gradients summed over the ranks in float32, for every backward pass."""
    return passes * 4 * trained * (ranks - 1) / ranks


def offload_bytes(passes: float, parameters: float, trained: float, ranks: float) -> float:
    """Over the bus to the host's memory and back: shards of weights for every pass, shards of
    gradients once.
    """
    return (4 * passes * parameters + 4 * trained) / ranks


def sync_bytes(parameters: float) -> float:
    """New weights sent to the servers in bfloat16."""
    return 2 * parameters


def compute_seconds(flops: float, peak: float, efficiency: float) -> float:
    """Time to compute at a share of the peak rate."""
    return flops / (peak * efficiency)


def moving_seconds(moved: float, bandwidth: float, efficiency: float) -> float:
    """Time to move bytes at a share of the bandwidth of memory, of the link between devices, or of
    the bus to the host.
    """
    return moved / (bandwidth * efficiency)
