//! Generate: images that are made pixel by pixel.
//!
//! Each sample goes down the line as an image of its own. A session gathers
//! what comes of them and puts it into a channel that has room for all there can
//! be, so that a client who does not read holds up neither the engine nor the
//! other callers; what waits there is counted in the call's bytes. When the
//! client goes, the response goes, with it the session, and the samples leave
//! the engine before the next step.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Code, Request, Status};
use tracing::Instrument as _;

use super::arriving::Arrived;
use super::observe::{CallCourse, CallEnding, Deadline, InProgress};
use super::outcome_tally::OutcomeTally;
use super::{WorkerService, convert, deadline, status};
use crate::imaging::{ImageInput, ImageRequest, PreprocessOptions, render};
use crate::model::{CallTask, Model};
use crate::proto;
use crate::proto::{Priority, pb};
use crate::serve::admission::{AdmissionCall, Bytes, PendingAnswers};
use crate::serve::capacity::CapacityShare;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::generate::{GenerateRequest, GeneratedRow, KeptPixels};
use crate::serve::job::{Answer, RequestedWork};
use crate::serve::rpc::error::RequestError;
use crate::serve::sample::TEMPERATURE_MAX;
use crate::serve::sequence::Sampling;

type Message = Result<pb::GenerateResponse, Status>;

/// What a request asks for, with defaults filled in.
#[derive(Debug)]
struct Plan {
    picture: ImageRequest,
    keep: KeptPixels,
    sampling: Sampling,
    n_samples: u32,
    scale: u32,
    log_probs: bool,
    rows: bool,
    /// Set when the primer is an image.
    preprocess: Option<PreprocessOptions>,
}

/// Sends the samples of a call down the line and returns what will come of
/// them.
pub(super) fn open(
    service: &WorkerService,
    request: Request<pb::GenerateRequest>,
) -> Result<Samples, RequestError> {
    let facts = service.facts()?;
    if facts.sequences.is_none() {
        return Err(RequestError::TaskMissing {
            task: CallTask::Generate,
            file: CallTask::Generate.file(),
        });
    }
    let (_, extensions, request) = request.into_parts();
    let deadline = extensions.get::<Deadline>().and_then(|deadline| deadline.0);
    let class = extensions.get().copied().unwrap_or(Priority::Interactive);
    let plan = Plan::new(request, service)?;
    let n_samples = plan.n_samples as usize;
    let side = service.model.side as usize;
    let (bytes, png_bytes) = plan.bytes(service)?;
    let (rows_in, rows) = mpsc::channel((n_samples * side).max(1));
    let images = (0..plan.n_samples)
        .map(|sample| {
            let generate = GenerateRequest {
                keep: plan.keep.clone(),
                sampling: plan.sampling,
                sample,
                rows: plan.rows.then(|| rows_in.clone()),
            };
            (
                plan.picture.clone(),
                RequestedWork::Generate(Box::new(generate)),
            )
        })
        .collect();
    let mut tally = OutcomeTally::new(service.metrics.clone(), deadline);
    tally.expect(n_samples);
    let arrived = extensions.get::<Arrived>().map(Arrived::take);
    let call = AdmissionCall {
        images,
        class,
        bytes: Bytes {
            request: convert::picture_bytes(&plan.picture),
            arrived: arrived.unwrap_or_default(),
            answer: bytes,
        },
        deadline,
        span: tracing::Span::current(),
    };
    let admission = &service.admission;
    let (places, (pending, pngs)) = admission
        .samples(class, n_samples)
        .and_then(|places| Ok((places, admission.submit_with(call, n_samples * png_bytes)?)))
        .map_err(RequestError::from)
        .inspect_err(|error| tally.rest(status::code(error)))?;
    // One first message, all rows, all results, one status.
    let (messages_in, messages) = mpsc::channel(2 + n_samples * (side + 1));
    let share = Arc::clone(&pending.bytes);
    let pngs = Arc::new(Mutex::new(pngs));
    let course = extensions.get::<CallCourse>().and_then(CallCourse::take);
    let session = Session {
        model: Arc::clone(&service.model),
        plan,
        deadline,
        tally,
        png_bytes,
        pngs: Arc::clone(&pngs),
        _places: places,
        messages: messages_in,
    };
    let session = session.run(pending, rows).in_current_span();
    Ok(Samples {
        messages,
        session: tokio::spawn(session).abort_handle(),
        course,
        _share: share,
        _pngs: pngs,
    })
}

impl Plan {
    fn new(request: pb::GenerateRequest, service: &WorkerService) -> Result<Self, RequestError> {
        let invalid = |field, problem: String| Err(RequestError::OptionInvalid { field, problem });
        let n_samples = request.samples.max(1);
        let samples_max = service.limits.samples_per_call_max;
        if n_samples > samples_max {
            return invalid(
                "samples",
                format!(
                    "{n_samples} in one call, over the limit of {samples_max} \
                     (--samples-per-call-max); split the call"
                ),
            );
        }
        let temperature = request.temperature.unwrap_or(1.0);
        if !(0.0..=TEMPERATURE_MAX).contains(&temperature) {
            return invalid(
                "temperature",
                format!("{temperature} is not within 0 and {TEMPERATURE_MAX}"),
            );
        }
        let top_p = request.top_p.unwrap_or(1.0);
        if !(top_p > 0.0 && top_p <= 1.0) {
            return invalid("top_p", format!("{top_p} is not above 0 and at most 1"));
        }
        let scale = request.scale.max(1);
        if scale > render::SCALE_MAX {
            return invalid(
                "scale",
                format!("{scale} is over the limit of {}", render::SCALE_MAX),
            );
        }
        let (picture, keep, preprocess) = primer(request.primer, &service.model)?;
        Ok(Self {
            picture,
            keep,
            sampling: Sampling {
                temperature,
                top_k: request.top_k,
                top_p,
                seed: request.seed.unwrap_or_else(any_seed),
            },
            n_samples,
            scale,
            log_probs: request.log_probs,
            rows: !request.no_rows,
            preprocess,
        })
    }

    /// Bytes that the call holds until its answer has been taken, beside the primer: for
    /// each sample its tokens in the worker, in rows and in the result, and its
    /// numbers; and what the picture of each sample takes at worst.
    fn bytes(&self, service: &WorkerService) -> Result<(usize, usize), RequestError> {
        let n_samples = self.n_samples as usize;
        let positions = service.model.positions();
        let png = 3 * positions * (self.scale * self.scale) as usize;
        let response = (n_samples * (png + 8 * positions)) as u64;
        let max = service.limits.response_bytes_max.as_u64();
        if response > max {
            return Err(RequestError::SamplesTooLarge {
                given: response,
                max,
            });
        }
        let numbers = positions * (size_of::<u16>() * 3 + size_of::<u32>() * 2 + size_of::<f32>());
        Ok((n_samples * numbers, png))
    }

    fn started(&self, model: &Model) -> pb::GenerateStarted {
        pb::GenerateStarted {
            model_digest: model.digest.clone(),
            samples: self.n_samples,
            temperature: self.sampling.temperature,
            top_k: self.sampling.top_k,
            top_p: self.sampling.top_p,
            seed: self.sampling.seed,
            scale: self.scale,
            preprocess: self.preprocess.map(proto::preprocess_applied),
        }
    }
}

/// A seed that nobody asked for.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    // Each has keys of its own.
    RandomState::new().hash_one(0_u8)
}

/// The known part of the image.
fn primer(
    primer: Option<pb::generate_request::Primer>,
    model: &Model,
) -> Result<(ImageRequest, KeptPixels, Option<PreprocessOptions>), RequestError> {
    let invalid = |field, problem| Err(RequestError::OptionInvalid { field, problem });
    let image = match primer {
        None => return Ok((prefix(Vec::new()), KeptPixels::All, None)),
        Some(pb::generate_request::Primer::Prefix(tokens)) => {
            return Ok((prefix(tokens.ids), KeptPixels::All, None));
        }
        Some(pb::generate_request::Primer::Image(image)) => image,
    };
    let options = convert::preprocess(image.preprocess.as_ref())?;
    let keep = match image.keep {
        Some(pb::image_primer::Keep::Rows(rows)) if rows <= model.side => KeptPixels::Rows(rows),
        Some(pb::image_primer::Keep::Rows(rows)) => {
            let problem = format!("{rows} are more than the {} that there are", model.side);
            return invalid("image.rows", problem);
        }
        Some(pb::image_primer::Keep::Mask(mask)) if mask.len() == model.positions() => {
            KeptPixels::Mask(mask.iter().map(|&kept| kept != 0).collect())
        }
        Some(pb::image_primer::Keep::Mask(mask)) => {
            let problem = format!(
                "{} bytes where {} are needed",
                mask.len(),
                model.positions()
            );
            return invalid("image.mask", problem);
        }
        None => {
            let problem = "neither rows nor mask says what to keep; set one".to_owned();
            return invalid("image.keep", problem);
        }
    };
    let source = image.image.and_then(|image| image.source);
    Ok((convert::picture(source, options)?, keep, Some(options)))
}

fn prefix(ids: Vec<u32>) -> ImageRequest {
    ImageRequest {
        input: ImageInput::Prefix(ids),
        options: PreprocessOptions::default(),
    }
}

/// The response: messages until the last one.
#[derive(Debug)]
pub(crate) struct Samples {
    messages: mpsc::Receiver<Message>,
    session: tokio::task::AbortHandle,
    /// Counts the call when its last message has been taken.
    course: Option<(CallEnding, InProgress)>,
    _share: Arc<CapacityShare>,
    /// Of the pictures that were not taken yet.
    _pngs: Arc<Mutex<CapacityShare>>,
}

impl Stream for Samples {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Message>> {
        let message = ready!(self.messages.poll_recv(cx));
        if let Some((ending, _)) = &mut self.course {
            match &message {
                Some(Err(status)) => ending.code = status.code(),
                // A status that was sent before stands.
                None if ending.code == Code::Cancelled => ending.code = Code::Ok,
                _ => {}
            }
        }
        Poll::Ready(message)
    }
}

impl Drop for Samples {
    fn drop(&mut self) {
        self.session.abort();
    }
}

/// The other end of [`Samples`].
#[derive(Debug)]
struct Session {
    model: Arc<Model>,
    plan: Plan,
    deadline: Option<Instant>,
    tally: OutcomeTally,
    /// What a picture takes at worst, and what all of them hold.
    png_bytes: usize,
    pngs: Arc<Mutex<CapacityShare>>,
    /// Before the last message is the last, so that a caller who has it can rely
    /// on the room it left: fields are dropped in this order.
    _places: CapacityShare,
    messages: mpsc::Sender<Message>,
}

impl Session {
    async fn run(mut self, mut pending: PendingAnswers, mut rows: mpsc::Receiver<GeneratedRow>) {
        use pb::generate_response::Message as Kind;
        self.send(Kind::Started(self.plan.started(&self.model)));
        let deadline = self.deadline;
        let outcome = tokio::select! {
            biased;
            outcome = self.gather(&mut pending, &mut rows) => outcome,
            () = deadline::passed(deadline) => Err(StageError::DeadlineExceeded { stage: RequestStage::Engine }.into()),
        };
        if let Err(error) = outcome {
            self.tally.rest(status::code(&error));
            let _ = self.messages.try_send(Err(status::of_call(&error)));
        }
    }

    /// Passes on rows and results until every sample has one.
    async fn gather(
        &mut self,
        pending: &mut PendingAnswers,
        rows: &mut mpsc::Receiver<GeneratedRow>,
    ) -> Result<(), RequestError> {
        let mut sample = 0;
        while sample < self.plan.n_samples {
            tokio::select! {
                biased;
                Some(row) = rows.recv() => self.row(&row),
                outcome = pending.next() => {
                    // A sample's rows come before its result.
                    while let Ok(row) = rows.try_recv() {
                        self.row(&row);
                    }
                    let outcome = outcome.unwrap_or(Err(StageError::Lost));
                    self.result(sample, outcome.map_err(RequestError::from)).await?;
                    sample += 1;
                }
            }
        }
        Ok(())
    }

    fn row(&self, row: &GeneratedRow) {
        self.send(pb::generate_response::Message::Row(pb::GeneratedRow {
            sample: row.sample,
            row: row.row,
            ids: row.tokens.iter().copied().map(u32::from).collect(),
        }));
    }

    async fn result(
        &mut self,
        sample: u32,
        outcome: Result<Answer, RequestError>,
    ) -> Result<(), RequestError> {
        let outcome = match outcome {
            Ok(answer) => self.image(answer).await,
            Err(error) => Err(error),
        };
        // Now it is known how large the picture is: a small part, since a palette
        // packs well.
        let n_bytes = outcome.as_ref().map_or(0, |image| image.png.len());
        let mut pngs = self.pngs.lock().unwrap_or_else(PoisonError::into_inner);
        drop(pngs.split(self.png_bytes.saturating_sub(n_bytes)));
        drop(pngs);
        self.tally
            .one(outcome.as_ref().map_or_else(status::code, |_| Code::Ok));
        let outcome = match outcome {
            Ok(image) => pb::generate_result::Outcome::Image(image),
            // All samples have the same primer.
            Err(
                error @ (RequestError::Stage(StageError::Image(_)) | RequestError::ImageMissing),
            ) => return Err(error),
            Err(error) if error.ends_call() => return Err(error),
            Err(error) => pb::generate_result::Outcome::Error(status::of_image(&error)),
        };
        self.send(pb::generate_response::Message::Result(pb::GenerateResult {
            sample,
            outcome: Some(outcome),
        }));
        Ok(())
    }

    async fn image(&self, answer: Answer) -> Result<pb::GeneratedImage, RequestError> {
        let Answer::Generated { tokens, log_probs } = answer else {
            return Err(StageError::Lost.into());
        };
        let (side, scale) = (self.model.side as usize, self.plan.scale as usize);
        let palette = self.model.palette_rgb8();
        let ids = tokens.iter().copied().map(u32::from).collect();
        // A large picture takes milliseconds, which are not for the runtime's
        // own threads.
        let png = tokio::task::spawn_blocking(move || {
            render::png(&tokens, &palette, side, scale, png::Compression::Balanced)
        })
        .await
        .map_err(|_| StageError::Lost)?
        .map_err(|_| StageError::Lost)?;
        Ok(pb::GeneratedImage {
            tokens: Some(pb::Tokens { ids }),
            png: png.into(),
            log_probs: if self.plan.log_probs {
                log_probs
            } else {
                Vec::new()
            },
        })
    }

    fn send(&self, message: pb::generate_response::Message) {
        let response = pb::GenerateResponse {
            message: Some(message),
        };
        // There is room for all there can be; a client who has gone misses it.
        let _ = self.messages.try_send(Ok(response));
    }
}
