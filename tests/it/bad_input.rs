//! Hostile and mistaken requests: each gets the right code and a message, and
//! the worker continues to serve.

use imagegpt::engine::fake::Script;
use imagegpt::proto::pb;
use tonic::Code;

use crate::harness::{self, embed, encoded, fake_answer, seeded, tokens, vector};

/// Bad images of one call, each beside a good image, with the expected error.
#[tokio::test]
async fn a_bad_image_fails_alone_and_says_why() {
    let mut running = harness::fake(Script::default(), &[]).await;
    let raw = |width, height, bytes: usize| pb::Image {
        source: Some(pb::image::Source::Rgb8(pb::RawImage {
            width,
            height,
            pixels: vec![0; bytes].into(),
        })),
    };
    let mut png = Vec::new();
    image::RgbImage::new(8, 8)
        .write_to(&mut std::io::Cursor::new(&mut png), image::ImageFormat::Png)
        .expect("a PNG");
    let truncated = png[..png.len() / 2].to_vec();
    let huge = png_claiming(60_000, 60_000);
    assert_eq!(huge.len(), 65);
    let cases: Vec<(pb::Image, &[&str])> = vec![
        (pb::Image { source: None }, &["encoded", "rgb8", "tokens"]),
        (encoded(vec![]), &["encoded"]),
        (
            encoded(&b"<html>not an image</html>"[..]),
            &["encoded", "PNG", "JPEG"],
        ),
        (encoded(truncated), &["encoded", "PNG"]),
        (encoded(huge), &["60000", "--image-pixels-max"]),
        (raw(0, 5, 0), &["rgb8", "0 x 5"]),
        (raw(2, 2, 11), &["rgb8", "11"]),
        (raw(u32::MAX, u32::MAX, 12), &["rgb8"]),
        (tokens(vec![1; 63]), &["tokens", "63", "64"]),
        (tokens(vec![1; 65]), &["tokens", "65", "64"]),
        (tokens(vec![]), &["tokens", "0"]),
        (tokens(with(5, 16)), &["tokens", "5", "16"]),
        (tokens(with(9, 17)), &["tokens", "9", "17"]),
        (tokens(with(3, u32::MAX)), &["tokens", "3", "4294967295"]),
    ];
    let good = seeded(7);
    let images = cases
        .iter()
        .flat_map(|(bad, _)| [bad.clone(), tokens(good.clone())])
        .collect();
    let response = running
        .client
        .embed(embed(images))
        .await
        .expect("a response")
        .into_inner();
    for (pair, (_, words)) in response.results.chunks(2).zip(&cases) {
        let (code, sentence) = vector(&pair[0]).expect_err("a bad image");
        assert_eq!(code, Code::InvalidArgument, "{sentence}");
        for word in *words {
            assert!(sentence.contains(word), "{sentence:?} lacks {word:?}");
        }
        assert_eq!(vector(&pair[1]).expect("a good image"), fake_answer(&good));
    }
    let invalid = "imagegpt_images_total{code=\"INVALID_ARGUMENT\"}";
    assert_eq!(running.sample(invalid).await, 14.0);
    assert_eq!(
        running.sample("imagegpt_images_total{code=\"OK\"}").await,
        14.0
    );
    running.end().await;
}

fn with(idx: usize, id: u32) -> Vec<u32> {
    let mut ids = vec![1; 64];
    ids[idx] = id;
    ids
}

/// Makes a PNG of 65 bytes whose header claims the given size.
fn png_claiming(width: u32, height: u32) -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8; 4], data: &[u8]| {
        png.extend(u32::try_from(data.len()).expect("small").to_be_bytes());
        let start = png.len();
        png.extend(kind);
        png.extend(data);
        let crc = crc32(&png[start..]);
        png.extend(crc.to_be_bytes());
    };
    let mut header = Vec::new();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    chunk(b"IHDR", &header);
    chunk(b"IDAT", &[0x78, 0x9c, 0x63, 0, 0, 0, 1, 0]);
    chunk(b"IEND", &[]);
    png
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & 0_u32.wrapping_sub(crc & 1))
        })
    })
}

#[tokio::test]
async fn a_bad_call_fails_whole_and_says_why() {
    let flags = [
        "--images-per-call-max",
        "100",
        "--request-bytes-max",
        "1MiB",
        "--response-bytes-max",
        "4KiB",
    ];
    let mut running = harness::fake(Script::default(), &flags).await;
    let cases: Vec<(pb::EmbedRequest, Code, &[&str])> = vec![
        (embed(vec![]), Code::InvalidArgument, &["images"]),
        (
            embed(vec![harness::flat(1); 10_000]),
            Code::InvalidArgument,
            &["images", "10000", "--images-per-call-max"],
        ),
        (
            embed(vec![encoded(vec![0; 2 << 20])]),
            Code::ResourceExhausted,
            &["1048576", "--request-bytes-max"],
        ),
        (
            pb::EmbedRequest {
                pooling: pb::Pooling::None.into(),
                ..embed(vec![harness::flat(1); 5])
            },
            Code::InvalidArgument,
            &["5120", "4096", "--response-bytes-max"],
        ),
        (
            pb::EmbedRequest {
                pooling: 9,
                ..embed(vec![harness::flat(1)])
            },
            Code::InvalidArgument,
            &["pooling", "9"],
        ),
        (
            pb::EmbedRequest {
                context: -1,
                ..embed(vec![harness::flat(1)])
            },
            Code::InvalidArgument,
            &["context", "-1"],
        ),
        (
            pb::EmbedRequest {
                preprocess: Some(pb::Preprocess { fit: 0, alpha: 5 }),
                ..embed(vec![harness::flat(1)])
            },
            Code::InvalidArgument,
            &["preprocess.alpha", "5"],
        ),
    ];
    for (request, code, words) in cases {
        let error = running.client.embed(request).await.expect_err("a bad call");
        assert_eq!(error.code(), code, "{error}");
        for word in words {
            assert!(error.message().contains(word), "{error} lacks {word:?}");
        }
    }
    assert_eq!(running.worker.images_in_flight(), 0, "nothing is held");
    let good = running
        .client
        .embed(embed(vec![tokens(seeded(1))]))
        .await
        .expect("serves on");
    assert_eq!(
        vector(&good.get_ref().results[0]).expect("a vector"),
        fake_answer(&seeded(1))
    );
    running.end().await;
}

/// 200 callers at the same time, each with its own mix of requests.
#[tokio::test(flavor = "multi_thread")]
async fn many_callers_with_good_and_bad_images_each_get_their_own() {
    let running = harness::onnx("micro", &[]).await;
    let mut one_by_one = running.client.clone();
    let mut expected = Vec::new();
    for seed in 0..200 {
        let response = one_by_one
            .embed(embed(vec![tokens(seeded(seed))]))
            .await
            .expect("alone");
        expected.push(vector(&response.get_ref().results[0]).expect("a vector"));
    }
    let calls: Vec<_> = (0..200_u32)
        .map(|seed| {
            let mut client = running.client.clone();
            let bad = match seed % 4 {
                0 => encoded(&b"garbage"[..]),
                1 => tokens(vec![99; 64]),
                2 => pb::Image { source: None },
                _ => tokens(vec![]),
            };
            tokio::spawn(async move {
                client
                    .embed(embed(vec![tokens(seeded(seed)), bad, tokens(seeded(seed))]))
                    .await
            })
        })
        .collect();
    for (call, expected) in calls.into_iter().zip(&expected) {
        let response = call
            .await
            .expect("no panic")
            .expect("an answer")
            .into_inner();
        assert_eq!(response.results.len(), 3);
        for good in [0, 2] {
            let got = vector(&response.results[good]).expect("a vector");
            // A batch of another size may sum in another order.
            let error = harness::relative_error(&got, expected);
            assert!(error <= 1e-5, "{error:e}");
        }
        let (code, _) = vector(&response.results[1]).expect_err("a bad image");
        assert_eq!(code, Code::InvalidArgument);
    }
    let page = running.metrics().await;
    assert_eq!(
        harness::sample(&page, "imagegpt_images_total{code=\"OK\"}"),
        600.0
    );
    assert_eq!(
        harness::sample(&page, "imagegpt_images_total{code=\"INVALID_ARGUMENT\"}"),
        200.0
    );
    let calls = "imagegpt_requests_total{method=\"Embed\",code=\"OK\"}";
    assert_eq!(harness::sample(&page, calls), 400.0);
    running.end().await;
}
