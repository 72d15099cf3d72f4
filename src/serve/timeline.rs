//! Times at which a call and its images pass the stages.
//!
//! Each image carries its own times ([`ImageTimeline`], in its ticket) and
//! leaves them with its request when it is answered. A request is a unary call
//! or one item of a stream; its image that was answered last decides, since the
//! caller waited for that one: its stages follow each other without a gap, so
//! they sum to the time of the call.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::proto::GrpcCode;

use super::trace::{BatchSpan, Calendar, CallSpan, SpanLink};

/// Part of a call's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallStage {
    /// From the call's headers until its request has arrived and is decoded.
    Receive,
    /// Until its images are admitted.
    Admission,
    /// Until a preprocessing thread takes the image.
    Wait,
    /// Until the image is tokens.
    Decode,
    /// Until a run of the model with the image begins.
    Queue,
    /// Until the run has ended; all runs, for an image that is generated.
    Inference,
    /// Until the answer has been written.
    Reply,
}

impl CallStage {
    pub(crate) const ALL: [Self; 7] = [
        Self::Receive,
        Self::Admission,
        Self::Wait,
        Self::Decode,
        Self::Queue,
        Self::Inference,
        Self::Reply,
    ];

    /// Name of the stage in trailers, logs and spans.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Receive => "receive",
            Self::Admission => "admission",
            Self::Wait => "wait",
            Self::Decode => "decode",
            Self::Queue => "queue",
            Self::Inference => "inference",
            Self::Reply => "reply",
        }
    }
}

/// Times of one image, kept by its ticket.
#[derive(Debug)]
pub(crate) struct ImageTimeline {
    request: RequestTimeline,
    admitted: Instant,
    taken: Option<Instant>,
    tokenized: Option<Instant>,
    /// First step of an image that is generated.
    generation_began: Option<Instant>,
    /// Number of the marks of [`Mark`] that the image has passed.
    n_passed: usize,
}

/// Moments of an image that its call knows at once, for a call that ends before
/// its images are answered.
#[derive(Debug, Clone, Copy)]
enum Mark {
    Taken,
    Tokenized,
    Running,
}

/// Run of the model in which images took part.
#[derive(Debug, Clone)]
pub(crate) struct ModelRun {
    pub began: Instant,
    pub ended: Instant,
    pub n_images: usize,
    pub span: Option<Arc<BatchSpan>>,
}

/// Times of an image that was answered, in their order: the end of each stage
/// is the beginning of the next.
#[derive(Debug, Clone)]
pub(crate) struct ImageTimes {
    /// Time at which the image's request had arrived.
    arrived: Instant,
    admitted: Instant,
    taken: Instant,
    tokenized: Instant,
    run_began: Instant,
    run_ended: Instant,
    /// Number of images in the run; 0 without a run of a batch.
    pub n_in_batch: usize,
    pub batch: Option<SpanLink>,
}

impl ImageTimeline {
    /// Timeline of an image that is admitted now.
    pub(crate) fn new(request: RequestTimeline, admitted: Instant) -> Self {
        request.call.0.admitted(admitted);
        Self {
            request,
            admitted,
            taken: None,
            tokenized: None,
            generation_began: None,
            n_passed: 0,
        }
    }

    /// Timeline of an image that belongs to no call.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self::new(RequestTimeline::none(), Instant::now())
    }

    /// Notes that a thread begins to turn the image into tokens.
    pub(crate) fn taken(&mut self) {
        let now = Instant::now();
        self.taken = Some(now);
        self.passed(Mark::Taken, now);
    }

    /// Notes that the image is tokens.
    pub(crate) fn tokenized(&mut self, at: Instant) {
        self.tokenized = Some(at);
        self.passed(Mark::Tokenized, at);
    }

    /// Notes that the first step of the image begins.
    pub(crate) fn generation_began(&mut self, at: Instant) {
        self.generation_began = Some(at);
        self.running(at);
    }

    /// Notes that a run with the image begins.
    pub(crate) fn running(&mut self, at: Instant) {
        self.passed(Mark::Running, at);
    }

    fn passed(&mut self, mark: Mark, at: Instant) {
        self.n_passed = mark as usize + 1;
        self.request.call.0.passed(mark, at);
    }

    /// Leaves the times with the request, now that the image is answered by a
    /// run, or without one.
    pub(crate) fn answered(self, run: Option<&ModelRun>) {
        let call = &self.request.call.0;
        let sampled = call.span.as_ref();
        // A stage that was not reached takes no time, and the stage before it
        // lasted until the answer. An image that joined a run in progress has
        // been in no queue.
        let (run_began, run_ended) = match (run, self.generation_began) {
            (Some(run), _) => (run.began, run.ended),
            (None, began) => {
                let now = Instant::now();
                (began.unwrap_or(now), now)
            }
        };
        let taken = self.taken.unwrap_or(run_ended);
        let tokenized = self.tokenized.unwrap_or(run_ended);
        let run_began = run_began.max(tokenized);
        let batch = run.and_then(|run| run.span.as_ref());
        let times = ImageTimes {
            arrived: self.request.arrived,
            admitted: self.admitted,
            taken,
            tokenized,
            run_began,
            run_ended: run_ended.max(run_began),
            n_in_batch: run.map_or(0, |run| run.n_images),
            batch: batch.zip(sampled).map(|(batch, call)| batch.link(call)),
        };
        if let Some(own) = &self.request.own {
            *own.lock().unwrap_or_else(PoisonError::into_inner) = Some(times.clone());
        }
        call.answered(times, self.n_passed);
    }
}

impl ImageTimes {
    /// Duration of a stage between the arrival of the request and the answer.
    pub(crate) fn duration(&self, stage: CallStage) -> Duration {
        let (began, ended) = self.stage(stage);
        ended.saturating_duration_since(began)
    }

    /// Times at which the image's request had arrived and its run ended.
    pub(crate) fn whole(&self) -> (Instant, Instant) {
        (self.arrived, self.run_ended)
    }

    /// Times of a stage between the arrival of the request and the answer.
    fn stage(&self, stage: CallStage) -> (Instant, Instant) {
        match stage {
            CallStage::Receive => (self.arrived, self.arrived),
            CallStage::Admission => (self.arrived, self.admitted),
            CallStage::Wait => (self.admitted, self.taken),
            CallStage::Decode => (self.taken, self.tokenized),
            CallStage::Queue => (self.tokenized, self.run_began),
            CallStage::Inference => (self.run_began, self.run_ended),
            CallStage::Reply => (self.run_ended, self.run_ended),
        }
    }
}

/// Times of one request: a unary call, or one item of a stream. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct RequestTimeline {
    call: CallTimeline,
    arrived: Instant,
    /// Times of the request's image that was answered last, if the call has
    /// other requests and the times of this one will be asked for.
    own: Option<Arc<Mutex<Option<ImageTimes>>>>,
}

impl RequestTimeline {
    /// Timeline of a request that belongs to no call.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        CallTimeline::new(Instant::now(), None, false).request()
    }

    /// Keeps the times of this request apart from those of other requests of
    /// the same stream.
    pub(crate) fn apart(mut self) -> Self {
        if self.call.0.is_stream {
            self.own = Some(Arc::default());
        }
        self
    }

    /// Returns the times of the image that was answered last.
    pub(crate) fn last(&self) -> Option<ImageTimes> {
        match &self.own {
            Some(own) => own.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            None => self.call.0.lock().last.clone(),
        }
    }
}

/// Times of a call. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct CallTimeline(Arc<CallState>);

#[derive(Debug)]
struct CallState {
    began: Instant,
    calendar: Option<Calendar>,
    span: Option<CallSpan>,
    /// True if the call may have any number of requests.
    is_stream: bool,
    /// Code with which the call ended; CANCELLED until then, since a call that
    /// is dropped was cancelled.
    code: AtomicUsize,
    images: Mutex<CallImages>,
}

/// Most images of a stream whose times are kept for its span.
const EVENTS_MAX: usize = 32;

/// Images of a call that were answered.
#[derive(Debug, Default)]
struct CallImages {
    /// Arrival of the call's first request.
    arrived: Option<Instant>,
    n: u64,
    /// Images of a unary call that were admitted, and when.
    n_admitted: u64,
    admitted: Option<Instant>,
    /// Images of a unary call that have passed each mark, or were answered
    /// before it, and the last moment at which one passed.
    passed: [(u64, Option<Instant>); 3],
    /// Times of the image that was answered last, of a unary call.
    last: Option<ImageTimes>,
    /// Sums over the images of a stream.
    sums: Option<Box<StreamSums>>,
}

#[derive(Debug, Default)]
struct StreamSums {
    stages: [Duration; CallStage::ALL.len()],
    n_in_batches: u64,
    /// Times of the first images, if the stream is sampled.
    first: Vec<ImageTimes>,
}

impl CallState {
    fn admitted(&self, at: Instant) {
        if !self.is_stream {
            let mut images = self.lock();
            images.n_admitted += 1;
            images.admitted = Some(at);
        }
    }

    fn passed(&self, mark: Mark, at: Instant) {
        if !self.is_stream {
            let mut images = self.lock();
            let (n, last) = &mut images.passed[mark as usize];
            *n += 1;
            *last = Some(last.map_or(at, |last| last.max(at)));
        }
    }

    fn answered(&self, times: ImageTimes, n_passed: usize) {
        let mut images = self.lock();
        images.n += 1;
        if !self.is_stream {
            for (n, _) in &mut images.passed[n_passed..] {
                *n += 1;
            }
            images.last = Some(times);
            return;
        }
        let sums = images.sums.get_or_insert_default();
        for stage in CallStage::ALL {
            sums.stages[stage as usize] += times.duration(stage);
        }
        sums.n_in_batches += times.n_in_batch as u64;
        if self.span.is_some() && sums.first.len() < EVENTS_MAX {
            sums.first.push(times);
        }
    }

    fn lock(&self) -> MutexGuard<'_, CallImages> {
        // Nothing below can panic halfway through a change.
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stage of a call, with the times at which it began and ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StageSpan {
    pub began: Instant,
    pub ended: Instant,
}

/// One value for each stage, in the order of [`CallStage::ALL`]; none for a
/// stage that a call did not reach.
pub(crate) type EachStage<T> = [Option<T>; CallStage::ALL.len()];

impl StageSpan {
    pub(crate) fn duration(&self) -> Duration {
        self.ended.saturating_duration_since(self.began)
    }
}

/// Times of a call, read at some moment.
#[derive(Debug)]
pub(crate) struct CallTimes {
    /// Stages of a unary call follow each other from its beginning to the
    /// moment of reading; those of a stream are means over its images.
    pub stages: EachStage<Duration>,
    pub total: Duration,
    pub n_images: u64,
    /// Images in the runs that the call's images took part in, on average; 0
    /// without runs of batches.
    pub batch: f64,
}

impl CallTimeline {
    /// Timeline of a call that began at this time.
    pub(crate) fn new(began: Instant, span: Option<CallSpan>, is_stream: bool) -> Self {
        Self(Arc::new(CallState {
            began,
            calendar: span.is_some().then(|| Calendar::now(began)),
            span,
            is_stream,
            code: AtomicUsize::new(GrpcCode::Cancelled as usize),
            images: Mutex::default(),
        }))
    }

    /// Timeline of a request of the call that has arrived now.
    pub(crate) fn request(&self) -> RequestTimeline {
        let now = Instant::now();
        self.0.lock().arrived.get_or_insert(now);
        RequestTimeline {
            call: self.clone(),
            arrived: now,
            own: None,
        }
    }

    /// True if a request of the call has arrived.
    pub(crate) fn has_arrived(&self) -> bool {
        self.0.lock().arrived.is_some()
    }

    /// Span of the call, if the call is sampled.
    pub(crate) fn span(&self) -> Option<(&CallSpan, Calendar)> {
        self.0.span.as_ref().zip(self.0.calendar)
    }

    /// Notes the code with which the call ended.
    pub(crate) fn ended(&self, code: GrpcCode) {
        self.0.code.store(code as usize, Ordering::Relaxed);
    }

    /// Code with which the call ended.
    pub(crate) fn code(&self) -> GrpcCode {
        let code = self.0.code.load(Ordering::Relaxed);
        *GrpcCode::ALL.get(code).unwrap_or(&GrpcCode::Unknown)
    }

    pub(crate) fn began(&self) -> Instant {
        self.0.began
    }

    pub(crate) fn is_stream(&self) -> bool {
        self.0.is_stream
    }

    /// Number of images that were answered.
    pub(crate) fn n_images(&self) -> u64 {
        self.0.lock().n
    }

    /// Stages of a unary call up to this moment, one after the other, with its
    /// deciding image.
    pub(crate) fn stages(&self, now: Instant) -> (EachStage<StageSpan>, Option<ImageTimes>) {
        // An image may be answered between this moment and the lock.
        let span = |began: Instant, ended: Instant| {
            Some(StageSpan {
                began: began.min(now),
                ended: ended.min(now),
            })
        };
        let images = self.0.lock();
        let mut stages = EachStage::default();
        let arrived = images.arrived.unwrap_or(now);
        stages[CallStage::Receive as usize] = span(self.0.began, arrived);
        let last = images.last.clone();
        let Some(last) = last.filter(|_| images.n == images.n_admitted) else {
            // The call ends before its images: they are in the stage that the
            // slowest of them has reached.
            if images.arrived.is_none() {
                return (stages, None);
            }
            let admitted = images.admitted;
            stages[CallStage::Admission as usize] = span(arrived, admitted.unwrap_or(now));
            let Some(mut at) = admitted else {
                return (stages, None);
            };
            let within = [CallStage::Wait, CallStage::Decode, CallStage::Queue];
            for (stage, (n_passed, last)) in within.into_iter().zip(images.passed) {
                if n_passed < images.n_admitted {
                    stages[stage as usize] = span(at, now);
                    return (stages, None);
                }
                let end = last.map_or(at, |last| last.max(at));
                stages[stage as usize] = span(at, end);
                at = end;
            }
            stages[CallStage::Inference as usize] = span(at, now);
            return (stages, None);
        };
        for stage in CallStage::ALL {
            let (began, ended) = last.stage(stage);
            stages[stage as usize] = match stage {
                CallStage::Receive => span(self.0.began, ended),
                CallStage::Reply => span(began, now),
                _ => span(began, ended),
            };
        }
        (stages, Some(last))
    }

    /// Times of the call up to this moment.
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of images stay far below 2^52"
    )]
    pub(crate) fn times(&self, now: Instant) -> CallTimes {
        let total = now.saturating_duration_since(self.0.began);
        if self.0.is_stream {
            let images = self.0.lock();
            let mut stages = EachStage::default();
            let mut batch = 0.0;
            if let Some(sums) = &images.sums {
                let n = u32::try_from(images.n.max(1)).unwrap_or(u32::MAX);
                for stage in &CallStage::ALL[1..CallStage::ALL.len() - 1] {
                    stages[*stage as usize] = Some(sums.stages[*stage as usize] / n);
                }
                batch = sums.n_in_batches as f64 / images.n.max(1) as f64;
            }
            return CallTimes {
                stages,
                total,
                n_images: images.n,
                batch,
            };
        }
        let (stages, last) = self.stages(now);
        CallTimes {
            stages: stages.map(|span| Some(span?.duration())),
            total,
            n_images: self.n_images(),
            batch: last.map_or(0, |last| last.n_in_batch) as f64,
        }
    }

    /// Times of the first images of a sampled stream.
    pub(crate) fn first_images(&self) -> Vec<ImageTimes> {
        let images = self.0.lock();
        let sums = images.sums.as_ref();
        sums.map(|sums| sums.first.clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Answers an image whose stages begin at these milliseconds of the call,
    /// and returns the durations of the call's stages at millisecond 100.
    fn stages(
        change: impl FnOnce(&mut ImageTimeline, Instant),
        run: Option<(u32, u32)>,
    ) -> Vec<(&'static str, u128)> {
        let began = Instant::now().checked_sub(50 * MS).expect("an old machine");
        let call = CallTimeline::new(began, None, false);
        call.0.lock().arrived = Some(began + MS);
        let request = RequestTimeline {
            arrived: began + MS,
            ..call.request()
        };
        let mut image = ImageTimeline::new(request, began + 3 * MS);
        change(&mut image, began);
        image.answered(run.map(|(from, to)| self::run(began, from, to)).as_ref());
        let times = call.times(began + 100 * MS);
        let sum: Duration = times.stages.iter().flatten().sum();
        assert_eq!(sum, times.total, "no gap and no overlap");
        let stages = CallStage::ALL.into_iter().zip(times.stages);
        let reached = stages.map(|(stage, time)| (stage.label(), time.expect("reached")));
        reached
            .map(|(label, time)| (label, time.as_millis()))
            .collect()
    }

    fn run(began: Instant, from: u32, to: u32) -> ModelRun {
        ModelRun {
            began: began + from * MS,
            ended: began + to * MS,
            n_images: 2,
            span: None,
        }
    }

    #[test]
    fn the_stages_of_an_image_follow_each_other() {
        let decoded = |image: &mut ImageTimeline, began: Instant| {
            image.taken = Some(began + 6 * MS);
            image.tokenized = Some(began + 10 * MS);
        };
        let found = stages(decoded, Some((15, 40)));
        let expected = [
            ("receive", 1),
            ("admission", 2),
            ("wait", 3),
            ("decode", 4),
            ("queue", 5),
            ("inference", 25),
            ("reply", 60),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn an_image_that_joins_a_run_in_progress_was_in_no_queue() {
        let late = |image: &mut ImageTimeline, began: Instant| {
            image.taken = Some(began + 6 * MS);
            image.tokenized = Some(began + 20 * MS);
        };
        let found = stages(late, Some((15, 40)));
        assert_eq!(found[4..6], [("queue", 0), ("inference", 20)]);
    }

    #[test]
    fn a_stage_that_was_not_reached_takes_no_time() {
        let found = stages(|image, began| image.taken = Some(began + 6 * MS), None);
        assert!(found[3].1 >= 40, "the decoder failed: {found:?}");
        assert_eq!(found[4..6], [("queue", 0), ("inference", 0)]);
        let found = stages(|_, _| {}, None);
        assert!(
            found[2].1 >= 40,
            "dropped before a thread took it: {found:?}"
        );
    }

    fn take(image: &mut ImageTimeline, at: Instant) {
        image.taken = Some(at);
        image.passed(Mark::Taken, at);
    }

    #[test]
    fn calls_that_end_early_are_in_the_stage_of_their_slowest_image() {
        let began = Instant::now();
        let at = |ms: u32| began + ms * MS;
        let call = CallTimeline::new(began, None, false);
        let read = |now: u32| {
            let times = call.times(at(now));
            let sum: Duration = times.stages.iter().flatten().sum();
            assert_eq!(sum, times.total, "no gap and no overlap");
            let stages = CallStage::ALL.into_iter().zip(times.stages);
            let reached = stages.filter_map(|(stage, time)| Some((stage.label(), time?)));
            let reached: Vec<_> = reached
                .map(|(label, time)| (label, time.as_millis()))
                .collect();
            reached
        };
        assert_eq!(read(1), [("receive", 1)], "while it arrives");
        assert!(!call.has_arrived());
        let request = call.request();
        call.0.lock().arrived = Some(at(2));
        assert_eq!(read(5), [("receive", 2), ("admission", 3)]);
        let mut images = [3, 3].map(|ms| ImageTimeline::new(request.clone(), at(ms)));
        take(&mut images[0], at(4));
        let waits = [("receive", 2), ("admission", 1), ("wait", 3)];
        assert_eq!(read(6), waits, "the second image has no thread yet");
        take(&mut images[1], at(7));
        images[0].tokenized(at(8));
        assert_eq!(read(9)[2..], [("wait", 4), ("decode", 2)]);
        images[1].tokenized(at(10));
        images[0].running(at(11));
        assert_eq!(read(12)[3..], [("decode", 3), ("queue", 2)]);
        let [first, mut second] = images;
        // The first is answered, and the second still waits.
        first.answered(Some(&run(began, 11, 13)));
        assert_eq!(read(14)[4..], [("queue", 4)]);
        second.running(at(15));
        assert_eq!(read(20)[4..], [("queue", 5), ("inference", 5)]);
        second.answered(Some(&run(began, 15, 21)));
        assert_eq!(
            read(30)[4..],
            [("queue", 5), ("inference", 6), ("reply", 9)]
        );
    }

    #[test]
    fn an_answer_after_the_moment_of_reading_adds_nothing() {
        let began = Instant::now();
        let call = CallTimeline::new(began, None, false);
        let mut image = ImageTimeline::new(call.request(), began + 2 * MS);
        take(&mut image, began + 3 * MS);
        image.tokenized(began + 4 * MS);
        image.answered(Some(&run(began, 20, 30)));
        for (now, queued) in [(10, 6), (4, 0), (25, 16), (40, 16)] {
            let times = call.times(began + now * MS);
            let sum: Duration = times.stages.iter().flatten().sum();
            assert_eq!(sum, times.total, "at {now} ms");
            assert_eq!(times.stages[CallStage::Queue as usize], Some(queued * MS));
        }
    }

    #[test]
    fn an_image_that_failed_holds_up_no_stage() {
        let began = Instant::now();
        let call = CallTimeline::new(began, None, false);
        let request = call.request();
        let mut images = [(); 2].map(|()| ImageTimeline::new(request.clone(), began + MS));
        for image in &mut images {
            take(image, began + 2 * MS);
        }
        let [broken, mut whole] = images;
        broken.answered(None);
        whole.tokenized(began + 3 * MS);
        let times = call.times(began + 9 * MS);
        assert_eq!(times.stages[CallStage::Queue as usize], Some(6 * MS));
    }

    #[test]
    fn a_stream_has_the_means_of_its_images() {
        let began = Instant::now()
            .checked_sub(100 * MS)
            .expect("an old machine");
        let call = CallTimeline::new(began, None, true);
        for (from, to) in [(20, 30), (30, 60)] {
            let mut image = ImageTimeline::new(call.request(), began + 3 * MS);
            image.taken = Some(began + 6 * MS);
            image.tokenized = Some(began + 10 * MS);
            image.answered(Some(&run(began, from, to)));
        }
        let times = call.times(began + 100 * MS);
        assert_eq!((times.n_images, times.total), (2, 100 * MS));
        let of = |stage: CallStage| times.stages[stage as usize];
        assert_eq!(of(CallStage::Queue), Some(15 * MS));
        assert_eq!(of(CallStage::Inference), Some(20 * MS));
        assert_eq!(of(CallStage::Reply), None, "of no single image");
    }
}
