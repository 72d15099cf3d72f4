//! Probe of an execution provider: that it is registered, has a device, and can
//! run a graph.

use ort::value::Tensor;
use prost::Message as _;

use crate::model::onnx::{
    DataType, Dim, GraphProto, IR_VERSION, ModelProto, NodeProto, OPSET, OperatorSet,
    ValueInfoProto,
};
use crate::runtime::Runtime;
use crate::runtime::error::{EngineError, cannot_be_had};

/// Runs a tiny graph on the provider. A provider that registers may still have
/// no device, which only a session notices.
///
/// # Errors
///
/// When the provider cannot be used; the text has the reason and the remedy.
pub fn probe(runtime: &Runtime) -> Result<(), EngineError> {
    let plain = Runtime {
        shares_arena: false,
        cuda_graphs: false,
        operators: None,
        ..runtime.clone()
    };
    let value = |name| ValueInfoProto::tensor(name, DataType::Float, &[Dim::Size(1)]);
    let model = ModelProto {
        ir_version: IR_VERSION,
        opset_import: vec![OperatorSet {
            domain: String::new(),
            version: OPSET,
        }],
        graph: Some(GraphProto {
            name: "probe".to_owned(),
            node: vec![NodeProto {
                op_type: "Neg".to_owned(),
                input: vec!["x".to_owned()],
                output: vec!["y".to_owned()],
                ..NodeProto::default()
            }],
            input: vec![value("x")],
            output: vec![value("y")],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    };
    let run = |text: &[u8]| -> ort::Result<()> {
        let mut session = plain.builder()?.commit_from_memory(text)?;
        session.run(ort::inputs!["x" => Tensor::from_array(([1], vec![1.0_f32]))?])?;
        Ok(())
    };
    run(&model.encode_to_vec()).map_err(|error| cannot_be_had(runtime.provider, &error))
}
