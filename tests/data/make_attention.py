"""Makes the one-node models that the attention operator is tested and measured with.

Run with any Python that has `onnx`; the files are committed, so tests need none:

    python tests/data/make_attention.py
"""

from pathlib import Path

from onnx import TensorProto, checker, helper, save

HERE = Path(__file__).parent


def write(name, node, inputs, domain):
    def value(name):
        return helper.make_tensor_value_info(
            name, TensorProto.FLOAT, ["batch", "positions", f"{name}_width"]
        )

    graph = helper.make_graph(
        [node], name, [value(i) for i in inputs], [value("output")]
    )
    model = helper.make_model(
        graph,
        producer_name="make_attention.py",
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)],
        ir_version=8,
    )
    checker.check_model(model)
    save(model, HERE / f"{name}.onnx")


# The worker's operator. Two heads leave the scale to the operator; eight and
# sixteen are small's, medium's and large's.
for heads, bf16 in [(2, 0), (2, 1), (8, 0), (8, 1), (16, 0), (16, 1)]:
    attributes = {"num_heads": heads}
    if bf16:
        attributes["bf16"] = 1
    write(
        f"causal_attention_{heads}{'_bf16' if bf16 else ''}",
        helper.make_node(
            "CausalAttention", ["qkv"], ["output"], domain="imagegpt", **attributes
        ),
        ["qkv"],
        "imagegpt",
    )

write(
    "causal_attention_scaled",
    helper.make_node(
        "CausalAttention",
        ["qkv"],
        ["output"],
        domain="imagegpt",
        num_heads=2,
        scale=0.5,
    ),
    ["qkv"],
    "imagegpt",
)

# ONNX Runtime's own, to compare with.
for heads in [8, 16]:
    write(
        f"multi_head_attention_{heads}",
        helper.make_node(
            "MultiHeadAttention",
            ["query", "key", "value"],
            ["output"],
            domain="com.microsoft",
            num_heads=heads,
            unidirectional=1,
        ),
        ["query", "key", "value"],
        "com.microsoft",
    )
