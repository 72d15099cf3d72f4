//! Generate: images that are generated pixel by pixel.
//!
//! Each sample is submitted as an image of its own. A session gathers the
//! samples' rows and results and puts them into a channel with room for all of
//! them, so that a client that does not read holds up neither the engine nor
//! other callers; the bytes in the channel count in the call's bytes. When the
//! client disconnects, the response is dropped and with it the session, and the
//! samples leave the engine before the next step.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Code, Request, Status};
use tracing::Instrument as _;

use super::arriving::Arrived;
use super::calling::CallOrigin;
use super::observe::{CallCourse, CallEnding, InProgress};
use super::outcome_tally::OutcomeTally;
use super::{WorkerService, convert, deadline, status};
use crate::imaging::{ImageInput, ImageRequest, PreprocessOptions, render};
use crate::model::{CallTask, Model};
use crate::proto;
use crate::proto::pb;
use crate::serve::admission::{AdmissionCall, Bytes, PendingAnswers};
use crate::serve::capacity::CapacityShare;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::generate::{GenerateRequest, GeneratedRow, KeptPixels};
use crate::serve::job::{Answer, RequestedWork};
use crate::serve::rpc::error::RequestError;
use crate::serve::sample::TEMPERATURE_MAX;
use crate::serve::sequence::Sampling;

type Message = Result<pb::GenerateResponse, Status>;

/// Options of a request, with defaults filled in.
#[derive(Debug)]
struct Plan {
    picture: ImageRequest,
    keep: KeptPixels,
    sampling: Sampling,
    n_samples: u32,
    scale: u32,
    log_probs: bool,
    rows: bool,
    /// Options of preprocessing, if the primer is an image.
    preprocess: Option<PreprocessOptions>,
}

/// Submits the samples of a call and returns the response, which streams their
/// rows and results.
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
    let CallOrigin {
        caller,
        class,
        deadline,
        timeline,
    } = CallOrigin::of(&extensions);
    let timeline = timeline.request();
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
        caller: caller.clone(),
        n_charged: n_samples,
        class,
        bytes: Bytes {
            request: convert::picture_bytes(&plan.picture),
            arrived: arrived.unwrap_or_default(),
            answer: bytes,
        },
        deadline,
        span: tracing::Span::current(),
        timeline,
    };
    let admission = &service.admission;
    let (places, (pending, pngs)) = admission
        .samples(&caller, class, n_samples)
        .and_then(|places| Ok((places, admission.submit_with(call, n_samples * png_bytes)?)))
        .map_err(RequestError::from)
        .inspect_err(|error| tally.rest(status::code(error)))?;
    // The channel has room for the first message, all rows, all results and one
    // status.
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
                    "the call has {n_samples} samples; the limit is {samples_max} \
                     (--samples-per-call-max); split the call"
                ),
            );
        }
        let temperature = request.temperature.unwrap_or(1.0);
        if !(0.0..=TEMPERATURE_MAX).contains(&temperature) {
            return invalid(
                "temperature",
                format!("{temperature} is not between 0 and {TEMPERATURE_MAX}"),
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
                format!("{scale} is too large; the limit is {}", render::SCALE_MAX),
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

    /// Returns the bytes that the call holds, in addition to the primer, until
    /// its answer has been read, and the largest size of one sample's PNG file.
    /// The bytes count for each sample its tokens in the worker, in rows and in
    /// the result, and its log probabilities.
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

/// Returns a random seed, for a request without one.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    // Each `RandomState` has keys of its own.
    RandomState::new().hash_one(0_u8)
}

/// Returns the known part of the image, the pixels that are kept, and the
/// options of preprocessing if the primer is an image.
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
            let problem = format!("{rows} rows are too many; the image has {}", model.side);
            return invalid("image.rows", problem);
        }
        Some(pb::image_primer::Keep::Mask(mask)) if mask.len() == model.positions() => {
            KeptPixels::Mask(mask.iter().map(|&kept| kept != 0).collect())
        }
        Some(pb::image_primer::Keep::Mask(mask)) => {
            let problem = format!(
                "the mask has {} bytes; it must have {}, one per pixel",
                mask.len(),
                model.positions()
            );
            return invalid("image.mask", problem);
        }
        None => {
            let problem = "neither rows nor mask is set; set one of them".to_owned();
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

/// Response of a Generate call: a stream of messages.
#[derive(Debug)]
pub(crate) struct Samples {
    messages: mpsc::Receiver<Message>,
    session: tokio::task::AbortHandle,
    /// Guards that count the call when its last message has been taken.
    course: Option<(CallEnding, InProgress)>,
    _share: Arc<CapacityShare>,
    /// Share of the PNG files in the call.
    _pngs: Arc<Mutex<CapacityShare>>,
}

impl Stream for Samples {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Message>> {
        let message = ready!(self.messages.poll_recv(cx));
        if let Some((ending, _)) = &mut self.course {
            match &message {
                Some(Err(status)) => ending.code = status.code(),
                // If an error was sent before, its code stays.
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

/// Task that gathers rows and results and produces [`Samples`].
#[derive(Debug)]
struct Session {
    model: Arc<Model>,
    plan: Plan,
    deadline: Option<Instant>,
    tally: OutcomeTally,
    /// Largest size of one PNG file.
    png_bytes: usize,
    /// Share of the PNG files of all samples.
    pngs: Arc<Mutex<CapacityShare>>,
    /// Places of the samples. The field is dropped before `messages`, since
    /// fields are dropped in their order: a caller that sees the end of the
    /// stream can rely on the places being free.
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

    /// Passes on rows and results until every sample has a result.
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
        // Now the size of the PNG file is known: a small part of the largest
        // size, since palette colors compress well.
        let n_bytes = outcome.as_ref().map_or(0, |image| image.png.len());
        let mut pngs = self.pngs.lock().unwrap_or_else(PoisonError::into_inner);
        drop(pngs.split(self.png_bytes.saturating_sub(n_bytes)));
        drop(pngs);
        self.tally
            .one(outcome.as_ref().map_or_else(status::code, |_| Code::Ok));
        let outcome = match outcome {
            Ok(image) => pb::generate_result::Outcome::Image(image),
            // All samples have the same primer, so the error concerns all of
            // them.
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
        // Encoding a large PNG file takes milliseconds, which must not block
        // the runtime's own threads.
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
        // The channel has room for all messages; sending fails only if the
        // client has disconnected.
        let _ = self.messages.try_send(Ok(response));
    }
}
