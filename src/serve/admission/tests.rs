use std::time::Duration;

use super::*;
use crate::imaging::{ImageInput, ImageLimits, Palette, PreprocessOptions, Preprocessor};
use crate::model::graph::{Context, Want};
use crate::serve::batcher::PreparedWork;
use crate::serve::metrics::Metrics;
use crate::serve::preprocess::queue::{PreprocessQueue, ThreadReach, queue};

fn picture() -> ImageRequest {
    ImageRequest {
        input: ImageInput::Encoded(bytes::Bytes::new()),
        options: PreprocessOptions::default(),
    }
}

/// Preprocessing for a model of one pixel and two colors.
fn preprocessing(batcher: crossbeam_channel::Sender<PreparedWork>) -> Preprocessing {
    let palette = Palette::new(vec![[-1.0; 3], [1.0; 3]]).expect("a palette");
    let limits = ImageLimits {
        image_bytes_max: 1,
        image_pixels_max: 1,
        decode_bytes_max: 1,
    };
    Preprocessing {
        preprocessor: Arc::new(Preprocessor::new(&palette, 1, limits)),
        decode_cpu_time_max: Duration::from_mins(1),
        batcher,
        metrics: Metrics::new().expect("metrics"),
    }
}

fn call(n_images: usize, bytes: usize) -> AdmissionCall {
    AdmissionCall {
        images: (0..n_images)
            .map(|_| (picture(), RequestedWork::Tokenize))
            .collect(),
        caller: Caller::default(),
        n_charged: n_images,
        class: Priority::Interactive,
        bytes: Bytes {
            answer: bytes,
            ..Default::default()
        },
        deadline: None,
        span: tracing::Span::none(),
        timeline: crate::serve::timeline::RequestTimeline::none(),
    }
}

fn item(bytes: usize) -> StreamItem {
    StreamItem {
        picture: picture(),
        work: RequestedWork::Tokenize,
        caller: Caller::default(),
        class: Priority::Bulk,
        bytes: Bytes {
            answer: bytes,
            ..Default::default()
        },
        deadline: None,
        span: tracing::Span::none(),
        timeline: crate::serve::timeline::RequestTimeline::none(),
    }
}

fn admission() -> (Admission, Arc<PreprocessQueue>, DrainRate) {
    let (batcher, _) = crossbeam_channel::bounded(1);
    admission_before(batcher)
}

fn admission_before(
    batcher: crossbeam_channel::Sender<PreparedWork>,
) -> (Admission, Arc<PreprocessQueue>, DrainRate) {
    let (bell, _) = crossbeam_channel::bounded(1);
    let (door, queue) = queue(bell, Metrics::new().expect("metrics"));
    let capacity = Capacity {
        images: 4,
        bytes: 100,
        samples: 4,
        interactive_reserve: 25,
    };
    let drain = DrainRate::default();
    let admission = Admission::new(capacity, drain.clone(), door, preprocessing(batcher));
    (admission, queue, drain)
}

#[test]
fn a_call_is_admitted_whole_or_not_at_all() {
    let (admission, _queue, _) = admission();
    let first = admission.submit(call(3, 10)).expect("there is room for 3");
    assert!(matches!(
        admission.submit(call(2, 10)),
        Err(StageError::Full { what: "images", .. })
    ));
    assert_eq!(admission.occupancy().images(), 3);
    drop(first);
}

#[test]
fn bytes_bound_a_call_too_and_come_back() {
    let (admission, queue, _) = admission();
    let first = admission.submit(call(1, 80)).expect("there is room");
    assert!(matches!(
        admission.submit(call(1, 30)),
        Err(StageError::Full { what: "bytes", .. })
    ));
    assert_eq!(
        admission.occupancy().images(),
        1,
        "a refusal keeps no images"
    );
    let job = queue.next(ThreadReach::Any).expect("a job");
    job.ticket.finish(Err(StageError::Lost));
    assert_eq!(admission.occupancy().images(), 0);
    assert_eq!(
        admission.occupancy().bytes(),
        80,
        "until the answer is taken"
    );
    drop(first);
    assert_eq!(admission.occupancy().bytes(), 0);
}

#[test]
fn what_never_fits_is_not_told_to_retry() {
    let (admission, _queue, _) = admission();
    assert!(matches!(
        admission.submit(call(5, 1)),
        Err(StageError::NeverFits { max: 4, .. })
    ));
    let bulk = AdmissionCall {
        class: Priority::Bulk,
        ..call(4, 1)
    };
    assert!(matches!(
        admission.submit(bulk),
        Err(StageError::NeverFits { max: 3, .. })
    ));
}

#[test]
fn callers_who_leave_free_their_places_at_once() {
    let (admission, queue, _) = admission();
    let pending = admission.submit(call(3, 10)).expect("room");
    drop(pending);
    assert_eq!(admission.occupancy().images(), 0);
    drop(admission);
    assert!(queue.next(ThreadReach::Any).is_none());
}

#[test]
fn tokens_go_straight_to_the_batcher() {
    let (batcher, arrivals) = crossbeam_channel::bounded(1);
    let (admission, queue, _) = admission_before(batcher);
    let infer = RequestedWork::Infer {
        context: Context::Raw,
        want: Want::Mean,
    };
    let tokens = |id| ImageRequest {
        input: ImageInput::Tokens(vec![id]),
        options: PreprocessOptions::default(),
    };
    let images = vec![
        (tokens(1), infer.clone()),
        (tokens(7), infer.clone()),
        (tokens(0), RequestedWork::Tokenize),
        (picture(), infer),
    ];
    let mut pending = admission
        .submit(AdmissionCall {
            images,
            ..call(0, 10)
        })
        .expect("room");
    let Ok(PreparedWork::Row(row)) = arrivals.try_recv() else {
        panic!("the first is at the batcher");
    };
    assert_eq!(*row.payload, [1]);
    assert!(arrivals.try_recv().is_err(), "and no other");
    let mut said = || pending.outcomes.next().map(|mut one| one.try_recv());
    assert!(said().is_some_and(|waits| waits.is_err()));
    assert!(matches!(said(), Some(Ok(Err(StageError::Image(_))))));
    assert!(matches!(said(), Some(Ok(Ok(Answer::Tokens(ids)))) if *ids == [0]));
    assert!(said().is_some_and(|waits| waits.is_err()));
    let job = queue
        .next(ThreadReach::Any)
        .expect("the last waits for a thread");
    assert!(!job.payload.is_tokens());
}

#[tokio::test]
async fn outcomes_come_in_the_order_of_the_call() {
    let (admission, queue, _) = admission();
    let mut pending = admission.submit(call(2, 10)).expect("room");
    let (first, second) = (
        queue.next(ThreadReach::Any).expect("one"),
        queue.next(ThreadReach::Any).expect("two"),
    );
    second.ticket.finish(Ok(Answer::Values(vec![2.0])));
    first.ticket.finish(Ok(Answer::Values(vec![1.0])));
    for expected in [1.0, 2.0] {
        let outcome = pending.next().await.expect("an outcome");
        assert!(matches!(outcome, Ok(Answer::Values(v)) if v == [expected]));
    }
    assert!(pending.next().await.is_none());
}

#[tokio::test]
async fn a_stream_waits_for_room() {
    let (admission, queue, _) = admission();
    let mut items = Vec::new();
    for _ in 0..3 {
        items.push(admission.submit_when_room(item(10)).await.expect("room"));
    }
    let waiting = admission.submit_when_room(item(10));
    tokio::pin!(waiting);
    assert!(futures_pending(waiting.as_mut()).await);
    queue
        .next(ThreadReach::Any)
        .expect("a job")
        .ticket
        .finish(Err(StageError::Lost));
    assert!(waiting.await.is_ok());
    let error = admission.submit_when_room(item(76)).await;
    assert!(matches!(error, Err(StageError::NeverFits { max: 75, .. })));
    let mut interactive = item(76);
    interactive.class = Priority::Interactive;
    let error = admission.submit_when_room(interactive).await;
    assert!(matches!(error, Err(StageError::NeverFits { max: 75, .. })));
}

/// True if the future is still pending.
async fn futures_pending<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> bool {
    tokio::select! {
        biased;
        _ = future => false,
        () = std::future::ready(()) => true,
    }
}

#[test]
fn jitter_is_a_share() {
    assert!((0.0..=1.0).contains(&jitter()));
}
