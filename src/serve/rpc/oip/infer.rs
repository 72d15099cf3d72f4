//! Inference request of the protocol: its checks, its work and its response.

use std::sync::Arc;
use std::time::Instant;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::parameters::{self, OutputOptions, RequestParameters};
use super::tensors::{InferInput, put_element};
use super::{Oip, VERSION, metadata};
use crate::engine::EngineFacts;
use crate::excerpt::Excerpt;
use crate::imaging::{ImageRequest, PreprocessOptions};
use crate::model::CallTask;
use crate::model::graph::{Context, Want};
use crate::model::head::LinearHead;
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::inference::model_infer_response::InferOutputTensor;
use crate::proto::inference::{InferParameter, ModelInferRequest, ModelInferResponse};
use crate::proto::{GrpcCode, pb};
use crate::serve::capacity::CapacityShare;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::job::{Answer, RequestedWork};
use crate::serve::rpc::calling::CallOrigin;
use crate::serve::rpc::embedding::Embedding;
use crate::serve::rpc::error::RequestError;
use crate::serve::rpc::observe::AnswerBytes;
use crate::serve::rpc::{
    Ask, Submitted, WorkerService, call_bytes, convert, heads, report, status,
};
use crate::serve::timeline::{CallStage, ImageTimes, RequestTimeline};

pub(super) const EMBEDDING: &str = "embedding";
pub(super) const LAST_HIDDEN_STATE: &str = "last_hidden_state";
pub(super) const LOGITS: &str = "logits";
pub(super) const NLL: &str = "nll";
pub(super) const TOKENS: &str = "tokens";
/// Bytes of a named class in addition to its label: its length, value and
/// index.
const NAMED_CLASS_BYTES: usize = 64;
/// Name of the output with the status of each image, which needs the parameter
/// `partial`.
const STATUS: &str = "status";
/// Parameter that marks the only response to a request of a stream, if the
/// request asks for the mark.
const FINAL: &str = "triton_final_response";

/// Output that a request asks for.
#[derive(Debug)]
struct Output {
    name: &'static str,
    ask: Ask,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Pooled features or states.
    Features(Box<Embedding>),
    Logits {
        /// The linear head; none for the checkpoint's own head.
        head: Option<Arc<LinearHead>>,
        /// Number of best classes to name, instead of all logits.
        n_named: Option<usize>,
    },
    Nll,
    Tokens,
}

impl Kind {
    /// Returns the linear head that makes the output.
    fn head(&self) -> Option<&LinearHead> {
        match self {
            Self::Logits { head, .. } => head.as_deref(),
            Self::Features(_) | Self::Nll | Self::Tokens => None,
        }
    }
}

/// Checked options of a request.
#[derive(Debug)]
struct Plan {
    id: String,
    facts: EngineFacts,
    outputs: Vec<Output>,
    n_images: usize,
    partial: bool,
    /// Index of the status among the outputs, if the request names it.
    status_at: Option<usize>,
    marks_final: bool,
    /// Options of preprocessing that a linear head decides.
    of_head: Option<PreprocessOptions>,
    origin: CallOrigin,
    timeline: RequestTimeline,
}

/// Request that was checked and may be submitted.
#[derive(Debug)]
pub(super) struct PreparedInfer {
    plan: Plan,
    /// Work for each output, in the order of the outputs.
    asks: Vec<Ask>,
    pictures: Vec<Result<ImageRequest, RequestError>>,
}

/// Request that was submitted.
#[derive(Debug)]
pub(super) struct RunningInfer {
    plan: Plan,
    submitted: Submitted,
}

impl PreparedInfer {
    /// Checks a request, with the cheap checks first, and converts its images.
    pub(super) fn new(
        oip: &Oip,
        mut request: ModelInferRequest,
        origin: CallOrigin,
    ) -> Result<Self, RequestError> {
        let timeline = origin.timeline.request().apart();
        let service = &*oip.0;
        let facts = service.facts()?;
        oip.check_model(&request.model_name, &request.model_version)?;
        let (manner, options) = parameters::of_request(&request.parameters)?;
        let (outputs, status_at) = outputs(service, &facts, &request, &options, &manner)?;
        let mut heads = outputs.iter().filter_map(|output| output.kind.head());
        let (preprocess, of_head) =
            parameters::preprocess(manner.preprocess, heads.next(), outputs.len())?;
        let input = InferInput::take(&mut request, service.model.positions())?;
        let asks: Vec<Ask> = outputs.iter().map(|output| output.ask.clone()).collect();
        service.check_size(input.n_images, &asks)?;
        let n_images = input.n_images;
        let pictures = input.pictures(preprocess)?;
        let timeout = manner
            .timeout
            .and_then(|timeout| Instant::now().checked_add(timeout));
        let deadline = match (origin.deadline, timeout) {
            (Some(call), Some(request)) => Some(call.min(request)),
            (call, request) => call.or(request),
        };
        Ok(Self {
            asks,
            plan: Plan {
                id: request.id,
                facts,
                outputs,
                n_images,
                partial: manner.partial,
                status_at,
                marks_final: manner.marks_final,
                of_head,
                origin: CallOrigin {
                    class: manner.class.map_or(origin.class, |asked| {
                        origin.caller.class(Some(asked), origin.class)
                    }),
                    deadline,
                    ..origin
                },
                timeline,
            },
            pictures,
        })
    }

    /// Returns the bytes that the request will hold while it is in the worker.
    pub(super) fn bytes(&self) -> usize {
        let bytes = call_bytes(&self.pictures, &self.asks, CapacityShare::default());
        bytes.request + bytes.answer
    }

    /// Submits the request, with the share that was taken while it arrived.
    pub(super) fn submit(
        self,
        oip: &Oip,
        arrived: CapacityShare,
    ) -> Result<RunningInfer, RequestError> {
        let plan = self.plan;
        let submitted = oip.0.submit(
            self.pictures,
            &self.asks,
            plan.origin.clone(),
            arrived,
            plan.timeline.clone(),
        )?;
        Ok(RunningInfer { plan, submitted })
    }
}

impl RunningInfer {
    /// Awaits the outcomes and makes the response.
    pub(super) async fn finish(
        self,
        oip: &Oip,
    ) -> Result<(ModelInferResponse, AnswerBytes), RequestError> {
        let (plan, submitted) = (self.plan, self.submitted);
        let outcomes = async {
            match plan.origin.deadline {
                Some(deadline) => tokio::time::timeout_at(deadline.into(), submitted.outcomes())
                    .await
                    .unwrap_or(Err(StageError::DeadlineExceeded {
                        stage: RequestStage::Queue,
                    }
                    .into())),
                None => submitted.outcomes().await,
            }
        };
        let (outcomes, held) = outcomes.await?;
        let started = Instant::now();
        let response = plan.response(&oip.0, outcomes)?;
        oip.0.metrics.totals().answered(started.elapsed());
        Ok((response, held))
    }
}

/// Stages whose times a response has as parameters, in milliseconds.
const TIMED: [(&str, CallStage); 4] = [
    ("wait_ms", CallStage::Wait),
    ("decode_ms", CallStage::Decode),
    ("queue_ms", CallStage::Queue),
    ("inference_ms", CallStage::Inference),
];

/// Says how long the image of a request that was answered last took in each
/// stage, and how many images were in its run.
fn say_times(times: &ImageTimes, mut say: impl FnMut(&str, ParameterChoice)) {
    for (name, stage) in TIMED {
        let duration = report::milliseconds(times.duration(stage));
        say(name, ParameterChoice::DoubleParam(duration));
    }
    if times.n_in_batch > 0 {
        let n = i64::try_from(times.n_in_batch).unwrap_or(i64::MAX);
        say("batch", ParameterChoice::Int64Param(n));
    }
}

/// Returns the outputs that a request names, or the model's first, and the
/// index of the status among them.
fn outputs(
    service: &WorkerService,
    facts: &EngineFacts,
    request: &ModelInferRequest,
    options: &OutputOptions,
    manner: &RequestParameters,
) -> Result<(Vec<Output>, Option<usize>), RequestError> {
    if request.outputs.is_empty() {
        let name = metadata::default_output(service);
        return Ok((vec![output(service, facts, manner, name, options)?], None));
    }
    let invalid = |problem: String| RequestError::TensorInvalid {
        tensor: "outputs".to_owned(),
        problem,
    };
    let mut outputs: Vec<Output> = Vec::with_capacity(request.outputs.len());
    let mut status_at = None;
    for tensor in &request.outputs {
        let options = parameters::of_output(options, &tensor.parameters)?;
        if tensor.name == STATUS {
            if !manner.partial || status_at.is_some() {
                return Err(invalid(
                    "status is only available with the parameter partial, and only once".to_owned(),
                ));
            }
            status_at = Some(outputs.len());
            continue;
        }
        let given = Excerpt::of(&tensor.name);
        if outputs.iter().any(|output| output.name == tensor.name) {
            return Err(invalid(format!("{given} is named twice")));
        }
        outputs.push(output(service, facts, manner, &tensor.name, &options)?);
    }
    if outputs.is_empty() {
        return Err(invalid(
            "status alone is not enough; name another output too".to_owned(),
        ));
    }
    Ok((outputs, status_at))
}

fn output(
    service: &WorkerService,
    facts: &EngineFacts,
    manner: &RequestParameters,
    name: &str,
    options: &OutputOptions,
) -> Result<Output, RequestError> {
    let features = |name, pooling: i32| {
        service.require(CallTask::Embed)?;
        let embedding = Embedding::new(
            &pb::EmbedStreamOptions {
                preprocess: Some(manner.preprocess),
                context: options.context,
                pooling,
                normalize: options.normalize,
                dtype: options.dtype,
                layers: options.layers.clone(),
                norm: options.norm,
                ..Default::default()
            },
            &service.model,
            facts,
        )?;
        Ok(Output {
            name,
            ask: Ask {
                work: embedding.work(),
                n_values: embedding.n_values(),
                dtype: embedding.dtype,
            },
            kind: Kind::Features(Box::new(embedding)),
        })
    };
    // Outputs whose values have only one type.
    let ask = |work, n_values| Ask {
        work,
        n_values,
        dtype: pb::DataType::F32,
    };
    let positions = service.model.positions();
    match name {
        EMBEDDING => features(EMBEDDING, options.pooling),
        LAST_HIDDEN_STATE => features(LAST_HIDDEN_STATE, pb::Pooling::None.into()),
        LOGITS => logits(service, facts, options, ask),
        NLL => {
            service.require(CallTask::Score)?;
            let work = RequestedWork::Infer {
                // The graph itself shifts the tokens: it needs the last pixel,
                // too.
                context: Context::Raw,
                want: Want::Nll,
            };
            Ok(Output {
                name: NLL,
                ask: ask(work, positions),
                kind: Kind::Nll,
            })
        }
        TOKENS => Ok(Output {
            name: TOKENS,
            ask: ask(RequestedWork::Tokenize, positions),
            kind: Kind::Tokens,
        }),
        name => {
            let given = Excerpt::of(name);
            Err(RequestError::TensorInvalid {
                tensor: "outputs".to_owned(),
                problem: format!(
                    "{given:?} is not an output; name {EMBEDDING}, {LAST_HIDDEN_STATE}, {LOGITS}, \
                     {NLL} or {TOKENS}"
                ),
            })
        }
    }
}

fn logits(
    service: &WorkerService,
    facts: &EngineFacts,
    options: &OutputOptions,
    ask: impl Fn(RequestedWork, usize) -> Ask,
) -> Result<Output, RequestError> {
    let head = heads::named(&service.heads.get(), &options.head, &service.model)?;
    let (work, n_computed) = if let Some(head) = &head {
        // The engine computes the features; the head is applied to them later.
        let work = heads::work(head, options.context, &service.model)?;
        (work, head.content.width().max(head.content.labels.len()))
    } else {
        let context = convert::context(options.context)?;
        let want = Want::Logits;
        (RequestedWork::Infer { context, want }, facts.n_classes)
    };
    let of_head = head.as_ref().map(|head| &head.content.labels);
    let labels = of_head.unwrap_or(&service.model.labels);
    // The text of named classes is counted before it is made, in units of f32.
    let n_text = options.n_classes.map_or(0, |n_named| {
        let longest = labels.iter().map(String::len).max().unwrap_or(0);
        n_named.min(n_computed) * (longest + NAMED_CLASS_BYTES) / size_of::<f32>()
    });
    Ok(Output {
        name: LOGITS,
        ask: ask(work, n_computed.max(n_text)),
        kind: Kind::Logits {
            head,
            n_named: options.n_classes,
        },
    })
}

/// Output tensor that is filled row by row, one row per image.
struct Tensor {
    name: &'static str,
    datatype: &'static str,
    /// Shape of one row.
    shape: Vec<usize>,
    raw: BytesMut,
    /// Only row of a tensor for one image, kept without a copy: most requests
    /// have one image.
    only: Option<Bytes>,
    n_images: usize,
    row: Row,
}

/// Placeholder row of an image that has no answer.
#[derive(Clone, Copy)]
enum Row {
    /// Number of zero bytes.
    Zeros(usize),
    /// Number of empty elements.
    Empty(usize),
}

impl Tensor {
    fn new(output: &Output, service: &WorkerService, facts: &EngineFacts, n_images: usize) -> Self {
        let positions = service.model.positions();
        let (datatype, shape, width) = match &output.kind {
            Kind::Features(embedding) => match embedding.dtype {
                pb::DataType::F16 => ("FP16", embedding.shape().to_vec(), 2),
                _ => ("FP32", embedding.shape().to_vec(), 4),
            },
            Kind::Logits { head, n_named } => {
                let n_classes = head
                    .as_ref()
                    .map_or(facts.n_classes, |head| head.content.labels.len());
                match n_named {
                    Some(n_named) => ("BYTES", vec![(*n_named).min(n_classes)], 0),
                    None => ("FP32", vec![n_classes], 4),
                }
            }
            Kind::Nll => ("FP32", vec![positions], 4),
            Kind::Tokens => ("INT32", vec![positions], 4),
        };
        let n_each: usize = shape.iter().product();
        let row = match width {
            0 => Row::Empty(n_each),
            width => Row::Zeros(n_each * width),
        };
        Self {
            name: output.name,
            datatype,
            raw: BytesMut::with_capacity(match &output.kind {
                // The only row is kept without a copy.
                Kind::Features(_) if n_images == 1 => 0,
                _ => n_images * n_each * width,
            }),
            only: None,
            n_images,
            shape,
            row,
        }
    }

    /// Appends the answer of one image.
    fn put(
        &mut self,
        kind: &Kind,
        service: &WorkerService,
        answer: Answer,
    ) -> Result<(), RequestError> {
        match (kind, answer) {
            (Kind::Features(embedding), answer) => {
                let row = embedding.tensor(answer)?.data;
                if self.n_images == 1 {
                    self.only = Some(row);
                } else {
                    self.raw.put(row);
                }
            }
            (Kind::Logits { n_named, .. }, Answer::Values(values)) => {
                let head = kind.head();
                let logits = match head {
                    Some(head) => head.logits(&values),
                    None => values,
                };
                if n_named.is_some() {
                    let labels = head.map_or(&service.model.labels, |head| &head.content.labels);
                    self.put_classes(&logits, labels);
                } else {
                    self.put_numbers(&logits);
                }
            }
            (Kind::Nll, Answer::Nll { nll, .. }) => self.put_numbers(&nll),
            (Kind::Tokens, Answer::Tokens(tokens)) => {
                for &token in &tokens {
                    self.raw.put_i32_le(token.into());
                }
            }
            _ => return Err(StageError::Lost.into()),
        }
        Ok(())
    }

    fn put_numbers(&mut self, values: &[f32]) {
        for &value in values {
            self.raw.put_f32_le(value);
        }
    }

    /// Appends the best classes in the form of the classification extension,
    /// "value:index:label": best first, and equal values in index order.
    fn put_classes(&mut self, logits: &[f32], labels: &[String]) {
        let n_named = self.shape.first().copied().unwrap_or(0);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        for idx in order.into_iter().take(n_named) {
            let value = logits[idx];
            let class = match labels.get(idx) {
                Some(label) => format!("{value}:{idx}:{label}"),
                None => format!("{value}:{idx}"),
            };
            put_element(&mut self.raw, &class);
        }
    }

    /// Appends the placeholder of an image without an answer.
    fn skip(&mut self) {
        match self.row {
            Row::Zeros(n_bytes) => self.raw.put_bytes(0, n_bytes),
            Row::Empty(n_elements) => (0..n_elements).for_each(|_| put_element(&mut self.raw, "")),
        }
    }

    fn finish(self) -> (InferOutputTensor, Bytes) {
        let n_images = self.n_images;
        let tensor = InferOutputTensor {
            name: self.name.to_owned(),
            datatype: self.datatype.to_owned(),
            shape: std::iter::once(n_images)
                .chain(self.shape)
                .map(|extent| i64::try_from(extent).unwrap_or(i64::MAX))
                .collect(),
            ..Default::default()
        };
        (tensor, self.only.unwrap_or_else(|| self.raw.freeze()))
    }
}

impl Plan {
    fn response(
        self,
        service: &WorkerService,
        outcomes: Vec<Result<Answer, RequestError>>,
    ) -> Result<ModelInferResponse, RequestError> {
        let facts = &self.facts;
        let n_images = self.n_images;
        let mut tensors: Vec<Tensor> = self
            .outputs
            .iter()
            .map(|output| Tensor::new(output, service, facts, n_images))
            .collect();
        let mut statuses = BytesMut::new();
        let mut outcomes = outcomes.into_iter();
        for index in 0..n_images {
            let mut failed = None;
            for (output, tensor) in self.outputs.iter().zip(&mut tensors) {
                let put = outcomes
                    .next()
                    .unwrap_or(Err(StageError::Lost.into()))
                    .and_then(|answer| tensor.put(&output.kind, service, answer));
                if let Err(cause) = put {
                    tensor.skip();
                    failed.get_or_insert(cause);
                }
            }
            match failed {
                Some(cause) if !self.partial => {
                    let cause = Box::new(cause);
                    return Err(RequestError::OfImage { index, cause });
                }
                Some(cause) => {
                    let code = GrpcCode::from(status::code(&cause));
                    put_element(&mut statuses, &format!("{code}: {cause}"));
                }
                None if self.partial => put_element(&mut statuses, ""),
                None => {}
            }
        }
        let (mut outputs, mut raw_output_contents) = (Vec::new(), Vec::new());
        for tensor in tensors {
            let (output, raw) = tensor.finish();
            outputs.push(output);
            raw_output_contents.push(raw);
        }
        if self.partial {
            let status = InferOutputTensor {
                name: STATUS.to_owned(),
                datatype: "BYTES".to_owned(),
                shape: vec![i64::try_from(n_images).unwrap_or(i64::MAX)],
                ..Default::default()
            };
            let at = self.status_at.unwrap_or(outputs.len());
            outputs.insert(at, status);
            raw_output_contents.insert(at, statuses.freeze());
        }
        let mut response = ModelInferResponse {
            model_name: service.model.name.clone(),
            model_version: VERSION.to_owned(),
            id: self.id,
            outputs,
            raw_output_contents,
            ..Default::default()
        };
        let mut say = |name: &str, choice| {
            let parameter_choice = Some(choice);
            let parameter = InferParameter { parameter_choice };
            response.parameters.insert(name.to_owned(), parameter);
        };
        if let Some(PreprocessOptions { fit, alpha }) = self.of_head {
            let word = |name: &str| ParameterChoice::StringParam(name.to_owned());
            say("fit", word(parameters::fit_name(fit)));
            say("alpha", word(parameters::alpha_name(alpha)));
        }
        if let Some(times) = self.timeline.last() {
            say_times(&times, &mut say);
        }
        if self.marks_final {
            say(FINAL, ParameterChoice::BoolParam(true));
        }
        Ok(response)
    }
}
