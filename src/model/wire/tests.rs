use prost::Message as _;

use super::*;
use crate::model::onnx::{
    AttributeProto, DataType, GraphProto, ModelProto, NodeProto, StringEntry, TensorProto,
    ValueInfoProto,
};

fn external(name: &str, entries: &[(&str, &str)]) -> TensorProto {
    let entry = |&(key, value): &(&str, &str)| StringEntry {
        key: key.to_owned(),
        value: value.to_owned(),
    };
    TensorProto {
        dims: vec![2, 3],
        data_type: 1,
        name: name.to_owned(),
        external_data: entries.iter().map(entry).collect(),
        data_location: 1,
        ..TensorProto::default()
    }
}

fn model(graph: GraphProto) -> Vec<u8> {
    let model = ModelProto {
        ir_version: 8,
        graph: Some(graph),
        ..ModelProto::default()
    };
    model.encode_to_vec()
}

fn node(op_type: &str, input: &[&str], output: &[&str]) -> NodeProto {
    NodeProto {
        op_type: op_type.to_owned(),
        input: input.iter().map(ToString::to_string).collect(),
        output: output.iter().map(ToString::to_string).collect(),
        ..NodeProto::default()
    }
}

fn field(number: u64, content: &[u8]) -> Vec<u8> {
    let mut field = Vec::new();
    put_field(&mut field, number, content);
    field
}

fn locations(graph: &[u8]) -> Vec<(String, bool)> {
    let external = look(graph).unwrap().external;
    let external = external.into_iter();
    external.map(|t| (t.location, t.is_nested)).collect()
}

#[track_caller]
fn refused(graph: &[u8], word: &str) {
    let error = look(graph).unwrap_err();
    assert!(error.contains(word), "{error}");
}

fn of_tensor(entries: &[(&str, &str)]) -> Vec<u8> {
    model(GraphProto {
        initializer: vec![external("w", entries)],
        ..GraphProto::default()
    })
}

/// Graph with a tensor in every place where a graph can have one.
fn everywhere() -> Vec<u8> {
    let tensor = |location: &str| external(location, &[("location", location)]).encode_to_vec();
    let inner = |location: &str| field(5, &tensor(location));
    let constant = NodeProto {
        attribute: vec![AttributeProto::tensor(
            "value",
            external("attribute", &[("location", "attribute")]),
        )],
        ..node("Constant", &[], &["c"])
    };
    let graph = GraphProto {
        initializer: vec![external("main", &[("location", "main")])],
        node: vec![constant],
        ..GraphProto::default()
    };
    let mut graph = graph.encode_to_vec();
    // An attribute's graph, and its list of graphs.
    let branch = [field(6, &inner("branch")), field(11, &inner("branches"))].concat();
    graph.extend(field(1, &field(5, &branch)));
    // Tensors and sparse tensors of an attribute, and a sparse initializer.
    let attribute = [
        field(10, &tensor("tensors")),
        field(22, &field(1, &tensor("sparse"))),
        field(23, &field(2, &tensor("sparses"))),
    ];
    graph.extend(field(1, &field(5, &attribute.concat())));
    graph.extend(field(15, &field(1, &tensor("sparse-initializer"))));
    let in_function = field(7, &field(5, &field(5, &tensor("function"))));
    let training = [field(1, &inner("training")), field(2, &inner("algorithm"))];
    [
        field(7, &graph),
        field(25, &in_function),
        field(20, &training.concat()),
    ]
    .concat()
}

#[test]
fn tensors_in_other_files_are_found_wherever_they_are() {
    let named = |location: &str, is_nested| (location.to_owned(), is_nested);
    let mut found = locations(&everywhere());
    found.sort();
    let mut expected = vec![
        named("main", false),
        named("attribute", false),
        named("branch", true),
        named("branches", true),
        named("tensors", false),
        named("sparse", false),
        named("sparses", false),
        named("sparse-initializer", false),
        named("function", true),
        named("training", true),
        named("algorithm", true),
    ];
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn tensors_are_replaced_wherever_they_are() {
    let graph = everywhere();
    assert_eq!(rewrite(&graph, &|_| Ok(Substitute::Keep)), Ok(None));
    let rewritten = rewrite(&graph, &|tensor| {
        Ok(if tensor.is_nested {
            Substitute::Inline(tensor.location.repeat(24).into_bytes())
        } else {
            Substitute::Elsewhere {
                location: format!("{}-elsewhere", tensor.location),
                offset: 7,
            }
        })
    });
    let rewritten = rewritten.unwrap().unwrap();
    let external = look(&rewritten).unwrap().external;
    assert_eq!(external.len(), 6);
    for tensor in external {
        assert_eq!(tensor.location, format!("{}-elsewhere", tensor.name));
        assert_eq!((tensor.offset, tensor.length), (7, Some(24)));
        assert_eq!((tensor.data_type, &*tensor.dims), (1, &[2, 3][..]));
    }
    for inlined in ["branch", "branches", "function", "training", "algorithm"] {
        let data = inlined.repeat(24);
        let places = rewritten.windows(data.len());
        assert_eq!(places.filter(|place| *place == data.as_bytes()).count(), 1);
    }
}

#[test]
fn sizes_and_places_are_checked() {
    let tensor = |entries: &[(&str, &str)]| {
        let entries = [&[("location", "w.bin")], entries].concat();
        look(&of_tensor(&entries)).unwrap().external.remove(0)
    };
    assert_eq!(tensor(&[]).range(24), Ok(0..24));
    assert_eq!(
        tensor(&[("offset", "8"), ("length", "24")]).range(32),
        Ok(8..32)
    );
    let beyond = |entries: &[(&str, &str)], word: &str| {
        let error = tensor(entries).range(32).unwrap_err();
        assert!(error.contains(word), "{error}");
    };
    beyond(
        &[("offset", "9")],
        "takes 24 bytes from offset 9, but w.bin has 32",
    );
    beyond(
        &[("offset", "18446744073709551615")],
        "from offset 18446744073709551615",
    );
    beyond(
        &[("length", "25")],
        "length of 25 bytes, but its shape takes 24",
    );
    let mut huge = tensor(&[]);
    huge.dims = vec![i64::MAX, 3];
    assert!(huge.range(32).unwrap_err().contains("has the shape"));
    huge.dims = vec![-1, 3];
    assert!(huge.range(32).unwrap_err().contains("has the shape"));
    huge.dims = vec![1 << 62, 1];
    assert!(huge.range(32).is_err());
    (huge.dims, huge.data_type) = (vec![1], 99);
    assert!(huge.range(32).unwrap_err().contains("type 99"));
}

#[test]
fn what_cannot_be_meant_is_refused() {
    refused(&of_tensor(&[]), "in another file, but has no location");
    refused(
        &of_tensor(&[("location", "a"), ("location", "b")]),
        "two locations",
    );
    for offset in ["-1", "1.5", "", "99999999999999999999"] {
        let graph = of_tensor(&[("location", "a"), ("offset", offset)]);
        refused(&graph, "must be a number of bytes");
    }
    refused(
        &of_tensor(&[("location", &"a".repeat(5000))]),
        "a name of 5000 bytes",
    );
    let many = TensorProto {
        dims: vec![1; 33],
        ..external("w", &[("location", "a")])
    };
    let many = GraphProto {
        initializer: vec![many],
        ..GraphProto::default()
    };
    refused(&model(many), "more than 32 dimensions");
    refused(b"hello, world", "truncated, or not ONNX");
    let whole = everywhere();
    for length in 1..whole.len() {
        let _ = look(&whole[..length]);
    }
}

#[test]
fn graphs_within_graphs_end_somewhere() {
    // A graph, its node, its attribute, and the graph of that.
    let mut graph = field(2, b"innermost");
    for _ in 0..1000 {
        graph = field(1, &field(5, &field(6, &graph)));
    }
    refused(&field(7, &graph), "more than 100 deep");
}

#[test]
fn operators_that_mix_a_batch_are_found() {
    let found = |graph: GraphProto| look(&model(graph)).unwrap().batch_scaled;
    let of = |nodes: Vec<NodeProto>| GraphProto {
        node: nodes,
        ..GraphProto::default()
    };
    assert_eq!(found(of(vec![node("MatMul", &["a", "b"], &["c"])])), None);
    for name in BATCH_SCALED {
        assert_eq!(found(of(vec![node(name, &["x"], &["y"])])), Some(name));
    }
    // A scale that is an initializer or constant does not depend on the images.
    let quantize = || node("QuantizeLinear", &["x", "scale"], &["y"]);
    assert_eq!(found(of(vec![quantize()])), Some("QuantizeLinear"));
    let constant = node("Constant", &[], &["scale"]);
    assert_eq!(found(of(vec![quantize(), constant])), None);
    let initialized = GraphProto {
        initializer: vec![TensorProto::int64s("scale", &[1])],
        ..of(vec![quantize()])
    };
    assert_eq!(found(initialized), None);
    // In a function and in a branch, too.
    let dynamic = node("DynamicQuantizeLinear", &["x"], &["y"]).encode_to_vec();
    let function = field(25, &field(7, &dynamic));
    assert_eq!(
        look(&function).unwrap().batch_scaled,
        Some("DynamicQuantizeLinear")
    );
    let branch = field(7, &field(1, &field(5, &field(6, &field(1, &dynamic)))));
    assert_eq!(
        look(&branch).unwrap().batch_scaled,
        Some("DynamicQuantizeLinear")
    );
}

#[test]
fn tensors_of_the_workers_own_operators_are_known() {
    let ours = |inputs: &[&str]| NodeProto {
        domain: IMAGEGPT.to_owned(),
        ..node("ImageLayers", inputs, &["y"])
    };
    let graph = |nodes: Vec<NodeProto>, output: &str| {
        let graph = GraphProto {
            initializer: ["a", "b", "c"]
                .map(|name| external(name, &[("location", "w")]))
                .into(),
            node: nodes,
            output: vec![ValueInfoProto::tensor(output, DataType::Float, &[])],
            ..GraphProto::default()
        };
        let external = look(&model(graph)).unwrap().external;
        external.iter().map(|t| t.is_packed).collect::<Vec<_>>()
    };
    let all = ["a", "b", "c"];
    assert_eq!(graph(vec![ours(&all)], "y"), [true; 3]);
    // Other operators read b, and c is also a result.
    let gather = node("Gather", &["b", "i"], &["x"]);
    assert_eq!(graph(vec![ours(&all), gather], "c"), [true, false, false]);
}

#[test]
fn a_fixed_batch_size_is_found() {
    use crate::model::onnx::Dim;
    let input = |name: &str, dims: &[Dim]| ValueInfoProto::tensor(name, DataType::Int64, dims);
    let found = |inputs: Vec<ValueInfoProto>| {
        let graph = GraphProto {
            input: inputs,
            ..GraphProto::default()
        };
        look(&model(graph)).unwrap().batch_fixed
    };
    let (fixed, free) = (
        [Dim::Size(4), Dim::Size(64)],
        [Dim::Name("batch"), Dim::Size(64)],
    );
    assert_eq!(found(vec![input("input_ids", &fixed)]), Some(4));
    assert_eq!(found(vec![input("input_ids", &free)]), None);
    assert_eq!(found(vec![input("input_ids", &[])]), None);
    assert_eq!(found(vec![input("input_ids", &[Dim::Size(0)])]), None);
    // Older graphs list their weights among the inputs.
    let both = vec![input("wte.weight", &fixed), input("input_ids", &free)];
    assert_eq!(found(both), None);
    assert_eq!(found(Vec::new()), None);
}
