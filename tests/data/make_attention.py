"""Makes the one-node models that the attention kernels are measured beside.

Run with any Python that has `onnx`; the files are committed, so benchmarks need none:

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
