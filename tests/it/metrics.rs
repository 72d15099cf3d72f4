//! The operator's page.

use std::process::{Command, Stdio};

use imagegpt::engine::fake::Script;

use crate::harness::{self, embed, encoded};

#[tokio::test]
async fn every_series_exists_from_the_start_and_histograms_are_true() {
    let mut running = harness::fake(Script::default(), &[]).await;
    let page = running.metrics().await;
    for series in [
        "imagegpt_requests_total{method=\"Embed\",code=\"OK\"}",
        "imagegpt_requests_total{method=\"Classify\",code=\"UNAVAILABLE\"}",
        "imagegpt_images_total{code=\"INVALID_ARGUMENT\"}",
        "imagegpt_images_dropped_total{reason=\"deadline\",stage=\"queue\"}",
        "imagegpt_batches_total{close_reason=\"full\"}",
        "imagegpt_queue_depth{class=\"bulk\"}",
        "imagegpt_engine_faults_total{kind=\"out_of_memory\"}",
        "imagegpt_cache_lookups_total{result=\"hit\"}",
        "imagegpt_images_coalesced_total",
        "imagegpt_runs_stopped_total",
        "imagegpt_images_in_flight",
    ] {
        assert_eq!(harness::sample(&page, series), 0.0, "{series}");
    }
    assert_eq!(harness::sample(&page, "imagegpt_ready"), 1.0);
    assert_eq!(
        harness::sample(&page, "imagegpt_images_in_flight_max"),
        1024.0
    );

    let mut png = Vec::new();
    image::RgbImage::new(9, 9)
        .write_to(&mut std::io::Cursor::new(&mut png), image::ImageFormat::Png)
        .expect("a PNG");
    let images = vec![harness::flat(1), encoded(png)];
    running
        .client
        .embed(embed(images))
        .await
        .expect("a response");
    let page = running.metrics().await;
    for (histogram, count) in [
        ("imagegpt_request_duration_seconds{method=\"Embed\"}", 1.0),
        ("imagegpt_decode_duration_seconds", 1.0),
        ("imagegpt_quantize_duration_seconds", 1.0),
        (
            "imagegpt_queue_duration_seconds{class=\"interactive\"}",
            2.0,
        ),
    ] {
        let (name, labels) = histogram.split_at(histogram.find('{').unwrap_or(histogram.len()));
        assert_eq!(
            harness::sample(&page, &format!("{name}_count{labels}")),
            count,
            "{name}"
        );
        let inside = labels.trim_matches(['{', '}']);
        let comma = if inside.is_empty() { "" } else { "," };
        let bucket = format!("{name}_bucket{{{inside}{comma}le=\"+Inf\"}}");
        assert_eq!(harness::sample(&page, &bucket), count, "{bucket}");
    }
    assert!(
        harness::sample(
            &page,
            "imagegpt_inference_duration_seconds_count{graph=\"hidden\"}"
        ) >= 1.0
    );
    running.end().await;
}

#[tokio::test]
async fn the_port_serves_nothing_else() {
    let running = harness::fake(Script::default(), &[]).await;
    let addr = running.worker.metrics_addr;
    for path in ["/", "/metrics/", "/metricsx", "/debug/pprof", "/livez/x"] {
        assert_eq!(harness::get(addr, path).await.0, 404, "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let (status, body) = harness::ask(addr, method, "/metrics").await;
        assert_eq!((status, body.as_str()), (405, ""), "{method}");
    }
    assert_eq!(harness::get(addr, "/metrics?x=1").await.0, 200);
    running.end().await;
}

/// Clients that connect and say nothing take every place, but not for long.
#[tokio::test]
async fn silent_connections_are_cut() {
    use tokio::io::AsyncReadExt as _;
    let running = harness::fake(Script::default(), &[]).await;
    let addr = running.worker.metrics_addr;
    let mut silent = Vec::new();
    for _ in 0..64 {
        silent.push(tokio::net::TcpStream::connect(addr).await.expect("a place"));
    }
    let started = std::time::Instant::now();
    assert_eq!(harness::get(addr, "/livez").await.0, 200);
    let elapsed = started.elapsed();
    assert!(elapsed < harness::PATIENCE / 2, "{elapsed:?}");
    for mut stream in silent {
        assert_eq!(stream.read(&mut [0]).await.expect("an end"), 0);
    }
    running.end().await;
}

/// The Prometheus project's own linter, where it is installed (`make test`
/// installs nothing; CI does).
#[tokio::test]
async fn promtool_finds_nothing_to_complain_about() {
    let running = harness::fake(Script::default(), &[]).await;
    let page = running.metrics().await;
    running.end().await;
    let installed = Command::new("promtool").arg("--version").output().is_ok();
    if !installed && std::env::var_os("CI").is_none() {
        return;
    }
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool, from Debian's package prometheus");
    let mut stdin = promtool.stdin.take().expect("a pipe");
    std::io::Write::write_all(&mut stdin, page.as_bytes()).expect("written");
    drop(stdin);
    let output = promtool.wait_with_output().expect("an end");
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
