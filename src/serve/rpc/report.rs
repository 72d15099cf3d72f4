//! Report of a call that has ended: the times in its trailers, its line in the
//! access log, and its span.

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use http::{HeaderName, HeaderValue};

use super::calling::CallerSlot;
use crate::proto::{GrpcCode, Priority, RpcMethod};
use crate::serve::timeline::{CallStage, CallTimeline, CallTimes, ImageTimes};
use crate::serve::trace::{CallContent, CallPart, SpanAttribute, number};

/// Trailer with the time of each stage of a call.
pub(super) const TIMING: HeaderName = HeaderName::from_static("imagegpt-timing");

/// Returns the times of a call up to now, in the form of the Server-Timing
/// header: milliseconds by stage.
pub(super) fn timing(timeline: &CallTimeline) -> HeaderValue {
    let times = timeline.times(Instant::now());
    // Room for eight times of 13 digits; a longer text would be cut.
    let mut text = [0; 384];
    let mut rest = &mut text[..];
    for (stage, duration) in CallStage::ALL.into_iter().zip(times.stages) {
        let Some(duration) = duration else { continue };
        put(&mut rest, stage.label(), duration);
        if stage == CallStage::Inference && times.batch > 0.0 {
            let _ = write!(rest, ";batch={}", rounded(times.batch));
        }
        let _ = rest.write_all(b", ");
    }
    put(&mut rest, "total", times.total);
    if timeline.is_stream() {
        let _ = write!(rest, ";images={}", times.n_images);
    }
    let n_left = rest.len();
    let written = &text[..text.len() - n_left];
    // The text has only letters, digits and punctuation.
    let value = HeaderValue::from_bytes(written);
    let mut value = value.unwrap_or_else(|_| HeaderValue::from_static(""));
    // HTTP/2 keeps other values in a table for the next header that is the
    // same, which this one never is.
    value.set_sensitive(true);
    value
}

/// Writes a time in milliseconds. Numbers with a point cost a microsecond per
/// call when they are written as such.
fn put(mut text: impl Write, name: &str, duration: Duration) {
    // A call of half a million years is cut.
    let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let _ = text.write_all(name.as_bytes());
    let _ = write!(text, ";dur={}.{:03}", micros / 1000, micros % 1000);
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Rounds to thousandths, so that a log line has no digits that mean nothing.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Facts about a call for its report.
#[derive(Debug)]
pub(super) struct CallReport {
    pub(super) timeline: CallTimeline,
    pub(super) method: RpcMethod,
    pub(super) caller: CallerSlot,
    pub(super) peer: Option<SocketAddr>,
    pub(super) request_id: HeaderValue,
    /// Span of the log, which names the method, the request id and the trace;
    /// none if the call has no line in the access log.
    pub(super) log_span: Option<tracing::Span>,
}

impl CallReport {
    /// Logs the call and sends its span, now that its answer has been written.
    fn end(&self) {
        if self.log_span.is_none() && self.timeline.span().is_none() {
            return;
        }
        let now = Instant::now();
        if let Some(span) = &self.log_span {
            span.in_scope(|| self.log(&self.timeline.times(now)));
        }
        self.trace(now);
    }

    fn class(&self) -> &'static str {
        self.caller.class().map_or("", Priority::label)
    }

    fn log(&self, times: &CallTimes) {
        let of = |stage: CallStage| {
            let duration = times.stages[stage as usize];
            duration.map(|duration| rounded(milliseconds(duration)))
        };
        // A call that is no stream has a whole number, which is written as one.
        let mean = rounded(times.batch);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a whole number of images in a batch"
        )]
        let whole = (mean.fract() == 0.0).then_some(mean as u64);
        let batch: &dyn tracing::Value = match &whole {
            Some(whole) => whole,
            None => &mean,
        };
        tracing::info!(
            target: "imagegpt::access",
            code = self.timeline.code().name(),
            peer = self.peer.map(tracing::field::display),
            class = self.class(),
            images = times.n_images,
            batch = (times.batch > 0.0).then_some(batch),
            receive_ms = of(CallStage::Receive),
            admission_ms = of(CallStage::Admission),
            wait_ms = of(CallStage::Wait),
            decode_ms = of(CallStage::Decode),
            queue_ms = of(CallStage::Queue),
            inference_ms = of(CallStage::Inference),
            reply_ms = of(CallStage::Reply),
            total_ms = rounded(milliseconds(times.total)),
            "call"
        );
    }

    fn trace(&self, now: Instant) {
        let Some((span, calendar)) = self.timeline.span() else {
            return;
        };
        // Somebody who may not call does not decide what is traced.
        if self.caller.caller().is_none() && span.is_by_parent_alone() {
            return;
        }
        let code = self.timeline.code();
        let (mut parts, mut events) = (Vec::new(), Vec::new());
        let n_images = self.timeline.n_images();
        if self.timeline.is_stream() {
            events.extend(self.timeline.first_images().iter().map(image_event));
        } else {
            let (stages, last) = self.timeline.stages(now);
            let reached = CallStage::ALL.into_iter().zip(stages);
            let reached = reached.filter_map(|(stage, span)| Some((stage, span?)));
            parts.extend(reached.map(|(stage, span)| {
                let mut part = CallPart {
                    name: stage.label(),
                    began: span.began,
                    ended: span.ended,
                    attributes: Vec::new(),
                    batch: None,
                };
                if stage == CallStage::Inference
                    && let Some(last) = &last
                    && last.n_in_batch > 0
                {
                    part.attributes
                        .push(number("imagegpt.batch", last.n_in_batch));
                    part.batch.clone_from(&last.batch);
                }
                part
            }));
        }
        let service = service(self.method);
        let images = usize::try_from(n_images).unwrap_or(usize::MAX);
        let mut attributes = vec![
            SpanAttribute::new("rpc.system", "grpc"),
            SpanAttribute::new("rpc.service", service),
            SpanAttribute::new("rpc.method", self.method.name()),
            SpanAttribute::new("rpc.grpc.status_code", i64::from(code as i32)),
            SpanAttribute::new("imagegpt.class", self.class()),
            number("imagegpt.images", images),
        ];
        if let Some(caller) = self
            .caller
            .caller()
            .filter(|caller| !caller.name().is_empty())
        {
            let name = caller.name().to_owned();
            attributes.push(SpanAttribute::new("imagegpt.caller", name));
        }
        if let Ok(id) = self.request_id.to_str() {
            attributes.push(SpanAttribute::new("imagegpt.request_id", id.to_owned()));
        }
        if let Some(peer) = self.peer {
            attributes.push(SpanAttribute::new("client.address", peer.ip().to_string()));
        }
        let n_events = events.len() as u64;
        span.end(CallContent {
            name: format!("{service}/{}", self.method.name()),
            calendar,
            began: self.timeline.began(),
            ended: now,
            attributes,
            failure: is_servers_fault(code).then(|| code.name()),
            parts,
            n_events_left_out: if self.timeline.is_stream() {
                n_images.saturating_sub(n_events)
            } else {
                0
            },
            events,
        });
    }
}

impl Drop for CallReport {
    fn drop(&mut self) {
        self.end();
    }
}

/// Returns the name of the service that has a method, without slashes.
fn service(method: RpcMethod) -> &'static str {
    let mut services = RpcMethod::SERVICES.iter();
    let found = services.find(|(_, methods)| methods.contains(&method.name()));
    found.map_or("", |(path, _)| path.trim_matches('/'))
}

/// Returns the event of one image of a stream.
fn image_event(image: &ImageTimes) -> CallPart {
    let stages = [
        ("imagegpt.admission_ms", CallStage::Admission),
        ("imagegpt.wait_ms", CallStage::Wait),
        ("imagegpt.decode_ms", CallStage::Decode),
        ("imagegpt.queue_ms", CallStage::Queue),
        ("imagegpt.inference_ms", CallStage::Inference),
    ];
    let mut attributes: Vec<SpanAttribute> = stages
        .into_iter()
        .map(|(name, stage)| SpanAttribute::new(name, milliseconds(image.duration(stage))))
        .collect();
    attributes.push(number("imagegpt.batch", image.n_in_batch));
    let (began, ended) = image.whole();
    CallPart {
        name: "image",
        began,
        ended,
        attributes,
        batch: None,
    }
}

/// True if a code means that the worker failed; other errors are the caller's
/// (conventions of OpenTelemetry for servers of RPC).
fn is_servers_fault(code: GrpcCode) -> bool {
    matches!(
        code,
        GrpcCode::Unknown
            | GrpcCode::DeadlineExceeded
            | GrpcCode::Unimplemented
            | GrpcCode::Internal
            | GrpcCode::Unavailable
            | GrpcCode::DataLoss
    )
}
