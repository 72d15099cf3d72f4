//! Many callers at the same time: no answer is lost or doubled, and nothing is
//! left behind.

use std::time::Duration;

use imagegpt::engine::fake::Script;
use tonic::{Code, Request};

use crate::harness::{self, embed, fake_answer, seeded, tokens, vector};

/// Callers that cancel at random moments, callers with short deadlines and
/// patient callers: each answer goes to its own caller, and nothing is left
/// behind.
#[tokio::test(flavor = "multi_thread")]
async fn cancels_and_deadlines_at_random_moments() {
    let script = Script {
        delay: Duration::from_millis(2),
        ..Default::default()
    };
    let flags = [
        "--images-in-flight-max",
        "256",
        "--images-per-call-max",
        "16",
    ];
    let running = harness::fake(script, &flags).await;
    let calls: Vec<_> = (0..400_u32)
        .map(|seed| {
            let mut client = running.client.clone();
            tokio::spawn(async move {
                let images: Vec<Vec<u32>> = (0..=seed % 5).map(|i| seeded(seed * 10 + i)).collect();
                let mut request = Request::new(embed(images.iter().cloned().map(tokens).collect()));
                match seed % 4 {
                    0 => request.set_timeout(Duration::from_millis(u64::from(seed % 50) + 1)),
                    1 => {
                        let hurry = Duration::from_micros(u64::from(seed) * 100);
                        let _ = tokio::time::timeout(hurry, client.embed(request)).await;
                        return "left";
                    }
                    _ => {}
                }
                match client.embed(request).await {
                    Ok(response) => {
                        for (result, ids) in response.get_ref().results.iter().zip(&images) {
                            assert_eq!(vector(result).expect("a vector"), fake_answer(ids));
                        }
                        "answered"
                    }
                    Err(error) => match error.code() {
                        Code::DeadlineExceeded | Code::Cancelled => "late",
                        Code::ResourceExhausted => "refused",
                        code => panic!("{code:?}: {error}"),
                    },
                }
            })
        })
        .collect();
    let mut answered = 0;
    for call in calls {
        answered += usize::from(call.await.expect("no panic") == "answered");
    }
    assert!(answered > 0, "somebody had patience and room");
    running.until_in_flight(0).await;
    let page = running.metrics().await;
    assert_eq!(harness::sample(&page, "imagegpt_images_in_flight"), 0.0);
    running.end().await;
}
