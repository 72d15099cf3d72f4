//! Metadata and configuration of the server and the model, in the protocol's
//! terms. Only the inputs, outputs and properties of the loaded model are
//! listed.

use std::collections::HashMap;

use super::infer::{EMBEDDING, LAST_HIDDEN_STATE, LOGITS, NLL, TOKENS};
use super::tensors::{IMAGE, INPUT_IDS, PIXELS};
use super::{VERSION, parameters};
use crate::engine::EngineFacts;
use crate::model::CallTask;
use crate::model::graph::Graph;
use crate::proto::inference as oip;
use crate::proto::inference::DataType;
use crate::proto::inference::model_metadata_response::TensorMetadata;
use crate::serve::rpc::WorkerService;
use crate::serve::rpc::error::RequestError;

/// Triton's name of the platform that runs the model.
const PLATFORM: &str = "onnxruntime_onnx";
const BACKEND: &str = "onnxruntime";
const EXTENSIONS: [&str; 5] = [
    "classification",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "statistics",
];
/// Number of priority levels: interactive and bulk.
const PRIORITY_LEVELS: u64 = 2;

/// Input or output tensor of the model.
struct Tensor {
    name: &'static str,
    data_type: DataType,
    /// Extents of the tensor of one image.
    dims: Vec<i64>,
}

impl Tensor {
    fn new(name: &'static str, data_type: DataType, dims: &[usize]) -> Self {
        Self {
            name,
            data_type,
            dims: dims
                .iter()
                .map(|&dim| i64::try_from(dim).unwrap_or(i64::MAX))
                .collect(),
        }
    }

    fn metadata(self) -> TensorMetadata {
        TensorMetadata {
            name: self.name.to_owned(),
            datatype: match self.data_type {
                DataType::TypeUint8 => "UINT8",
                DataType::TypeInt32 => "INT32",
                DataType::TypeInt64 => "INT64",
                DataType::TypeString => "BYTES",
                _ => "FP32",
            }
            .to_owned(),
            shape: std::iter::once(-1).chain(self.dims).collect(),
        }
    }
}

fn inputs(service: &WorkerService) -> Vec<Tensor> {
    vec![
        // perf_analyzer cannot handle an image without extents; a request may
        // also have the shape [-1].
        Tensor::new(IMAGE, DataType::TypeString, &[1]),
        Tensor::new(INPUT_IDS, DataType::TypeInt64, &[service.model.positions()]),
        Tensor {
            name: PIXELS,
            data_type: DataType::TypeUint8,
            dims: vec![-1, -1, 3],
        },
    ]
}

/// Returns the model's outputs; the first is the default of a request that
/// names none.
fn outputs(service: &WorkerService, facts: &EngineFacts) -> Vec<Tensor> {
    let model = &service.model;
    let (width, positions) = (facts.dimension, model.positions());
    let float = DataType::TypeFp32;
    let heads = service.heads.get();
    let mut outputs = Vec::new();
    if model.can(CallTask::Embed) {
        outputs.push(Tensor::new(EMBEDDING, float, &[width]));
    }
    if model.graphs.contains_key(&Graph::Hidden) {
        outputs.push(Tensor::new(LAST_HIDDEN_STATE, float, &[positions, width]));
    }
    if model.can(CallTask::Classify) {
        outputs.push(Tensor::new(LOGITS, float, &[facts.n_classes]));
    } else if let [head] = &heads[..] {
        outputs.push(Tensor::new(LOGITS, float, &[head.content.labels.len()]));
    } else if !heads.is_empty() {
        // The number of classes depends on the head that a request names.
        outputs.push(Tensor {
            name: LOGITS,
            data_type: float,
            dims: vec![-1],
        });
    }
    if model.can(CallTask::Score) {
        outputs.push(Tensor::new(NLL, float, &[positions]));
    }
    outputs.push(Tensor::new(TOKENS, DataType::TypeInt32, &[positions]));
    outputs
}

/// Returns the default output of a request that names none: the first of
/// [`outputs`].
pub(super) fn default_output(service: &WorkerService) -> &'static str {
    // The list itself is not made here, since every call would pay for it.
    let model = &service.model;
    if model.can(CallTask::Embed) {
        EMBEDDING
    } else if model.can(CallTask::Classify) || !service.heads.get().is_empty() {
        LOGITS
    } else if model.can(CallTask::Score) {
        NLL
    } else {
        TOKENS
    }
}

pub(super) fn server() -> oip::ServerMetadataResponse {
    oip::ServerMetadataResponse {
        name: "imagegpt".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        extensions: EXTENSIONS.map(str::to_owned).into(),
    }
}

pub(super) fn model(service: &WorkerService) -> Result<oip::ModelMetadataResponse, RequestError> {
    let facts = service.facts()?;
    let tensors = |tensors: Vec<Tensor>| tensors.into_iter().map(Tensor::metadata).collect();
    Ok(oip::ModelMetadataResponse {
        name: service.model.name.clone(),
        versions: vec![VERSION.to_owned()],
        platform: PLATFORM.to_owned(),
        inputs: tensors(inputs(service)),
        outputs: tensors(outputs(service, &facts)),
        properties: properties(service, &facts),
    })
}

fn properties(service: &WorkerService, facts: &EngineFacts) -> HashMap<String, String> {
    let model = &service.model;
    let json = |labels: &[String]| serde_json::Value::from(labels.to_vec()).to_string();
    let mut properties = vec![
        ("digest".to_owned(), model.digest.clone()),
        ("weights_digest".to_owned(), model.weights_digest.clone()),
        ("side".to_owned(), model.side.to_string()),
        ("execution_provider".to_owned(), facts.provider.to_owned()),
    ];
    let layers: Vec<String> = model
        .layers_of_any_norm()
        .iter()
        .map(ToString::to_string)
        .collect();
    if !layers.is_empty() {
        properties.push(("layers".to_owned(), layers.join(",")));
    }
    if let Some(layer) = model.layer_default() {
        properties.push(("layer_default".to_owned(), layer.to_string()));
    }
    if !model.labels.is_empty() {
        properties.push(("labels".to_owned(), json(&model.labels)));
    }
    for head in service.heads.get().iter() {
        let content = &head.content;
        let mut push =
            |fact: &str, value| properties.push((format!("{fact}.{}", head.name), value));
        push("labels", json(&content.labels));
        if let Some(fit) = content.fit {
            push("fit", parameters::fit_name(fit).to_owned());
        }
        if let Some(alpha) = content.alpha {
            push("alpha", parameters::alpha_name(alpha).to_owned());
        }
    }
    if !model.notice.is_empty() {
        properties.push(("notice".to_owned(), model.notice.clone()));
    }
    properties.into_iter().collect()
}

pub(super) fn config(service: &WorkerService) -> Result<oip::ModelConfigResponse, RequestError> {
    let facts = service.facts()?;
    let limits = &service.limits;
    let input = |tensor: Tensor| oip::ModelInput {
        name: tensor.name.to_owned(),
        data_type: tensor.data_type.into(),
        dims: tensor.dims,
        optional: true,
    };
    let output = |tensor: Tensor| oip::ModelOutput {
        name: tensor.name.to_owned(),
        data_type: tensor.data_type.into(),
        dims: tensor.dims,
    };
    let policy = oip::ModelQueuePolicy {
        timeout_action: oip::model_queue_policy::TimeoutAction::Reject.into(),
        default_timeout_microseconds: 0,
        allow_timeout_override: true,
        max_queue_size: limits.images_in_flight_max,
    };
    let digest = oip::ModelParameter {
        string_value: service.model.digest.clone(),
    };
    let config = oip::ModelConfig {
        name: service.model.name.clone(),
        platform: PLATFORM.to_owned(),
        max_batch_size: i32::try_from(limits.images_per_call_max).unwrap_or(i32::MAX),
        input: inputs(service).into_iter().map(input).collect(),
        output: outputs(service, &facts).into_iter().map(output).collect(),
        default_model_filename: String::new(),
        dynamic_batching: Some(oip::ModelDynamicBatching {
            // The sizes of batches depend on measurements; see the README.
            preferred_batch_size: Vec::new(),
            max_queue_delay_microseconds: 0,
            preserve_ordering: false,
            priority_levels: PRIORITY_LEVELS,
            default_priority_level: 1,
            default_queue_policy: Some(policy),
        }),
        parameters: HashMap::from([("digest".to_owned(), digest)]),
        backend: BACKEND.to_owned(),
        model_transaction_policy: Some(oip::ModelTransactionPolicy { decoupled: false }),
    };
    Ok(oip::ModelConfigResponse {
        config: Some(config),
    })
}
