//! The HTTP server of metrics and probes.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use imagegpt::engine::Engine as _;
use imagegpt::engine::fake::Script;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{self, embed, encoded};
use crate::process;
use crate::web::{ask_host, ask_whole};

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

const EACH: Duration = Duration::from_millis(10);

#[tokio::test]
async fn what_a_device_waits_for_the_worker_is_a_gap_and_idleness_is_none() {
    // Outside of its runs for as long as within.
    let script = Script {
        delay: EACH,
        ..Default::default()
    };
    let factory = harness::altered(script, |engine| {
        engine.run = Box::new(|engine, run, stop| {
            process::pause(EACH / 2);
            let outcome = engine.run(run, stop);
            process::pause(EACH / 2);
            outcome
        });
    });
    let flags = ["--max-batch-size", "1", "--max-queue-delay", "0s"];
    let micro = harness::model_dir("micro");
    let mut running = harness::start(&micro, &flags, Some(factory)).await;
    // Long, measured by what a gap is; a busy machine makes it longer.
    harness::pause(EACH * 50).await;
    let images = (0..8).map(harness::flat).collect();
    let response = running.client.embed(embed(images)).await;
    assert_eq!(response.expect("a response").get_ref().results.len(), 8);
    let count = "imagegpt_engine_gap_seconds_count{device=\"0\"}";
    let sum = "imagegpt_engine_gap_seconds_sum{device=\"0\"}";
    let page = running.metrics().await;
    assert_eq!(harness::sample(&page, count), 8.0);
    let gaps = harness::sample(&page, sum);
    // Half of one before the first run, and seven between runs.
    assert!(gaps >= EACH.as_secs_f64() * 7.5, "{gaps}");
    assert!(gaps < EACH.as_secs_f64() * 40.0, "{gaps}");
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

/// Returns the status of each page under a host.
async fn statuses(addr: std::net::SocketAddr, host: &str) -> Vec<String> {
    let mut found = Vec::new();
    for path in ["/metrics", "/livez", "/readyz", "/nothing"] {
        let (head, body) = ask_host(addr, &format!("GET {path} HTTP/1.1"), host, b"").await;
        let status = head.split(' ').nth(1).unwrap_or("none").to_owned();
        let has_series = String::from_utf8_lossy(&body).contains("imagegpt_ready");
        assert_eq!(has_series, path == "/metrics" && status == "200", "{host}");
        found.push(status);
    }
    found
}

/// A page of the internet whose name now means this machine sends that name.
#[tokio::test]
async fn on_loopback_pages_are_read_under_names_that_mean_this_machine_alone() {
    let running = harness::fake(Script::default(), &[]).await;
    let addr = running.worker.metrics_addr;
    let port = addr.port();
    for host in [
        "127.0.0.1",
        &addr.to_string(),
        &format!("localhost:{port}"),
        &format!("[::1]:{port}"),
        // Of a proxy on this machine that passes on what it was asked for.
        "10.1.2.3:8443",
        "[2001:db8::1]:8443",
        "",
    ] {
        let all = statuses(addr, host).await;
        assert_eq!(all, ["200", "200", "200", "404"], "{host}");
    }
    for host in [
        "evil.example",
        &format!("evil.example:{port}"),
        "127.0.0.1.evil.example",
        "worker",
    ] {
        assert_eq!(statuses(addr, host).await, ["421"; 4], "{host}");
    }
    let target = format!("GET http://evil.example:{port}/metrics HTTP/1.1");
    let (head, body) = ask_host(addr, &target, "localhost", b"").await;
    assert!(head.starts_with("http/1.1 421 "), "{head}");
    assert!(String::from_utf8_lossy(&body).contains("--metrics-listen"));
    running.end().await;
}

/// In a cluster, scrapers and probes use names of services and pods.
#[tokio::test]
async fn beyond_loopback_pages_are_read_under_any_name() {
    let running = harness::fake(Script::default(), &["--metrics-listen", "0.0.0.0:0"]).await;
    let port = running.worker.metrics_addr.port();
    let addr = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    for host in ["worker.svc:9090", "10.1.2.3:9090", "localhost"] {
        let all = statuses(addr, host).await;
        assert_eq!(all, ["200", "200", "200", "404"], "{host}");
    }
    running.end().await;
}

/// Of two hosts a proxy may take one and the worker the other.
#[tokio::test]
async fn a_request_has_one_host() {
    for flags in [&[][..], &["--metrics-listen", "0.0.0.0:0"]] {
        let running = harness::fake(Script::default(), flags).await;
        let port = running.worker.metrics_addr.port();
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        for (head, expected) in [
            ("HTTP/1.1\r\nhost: localhost", "200"),
            ("HTTP/1.1\r\nhost: localhost\r\nhost: localhost", "400"),
            ("HTTP/1.1\r\nhost: localhost\r\nhost: evil.example", "400"),
            ("HTTP/1.1\r\nhost: evil example", "400"),
            ("HTTP/1.1\r\nhost: user@localhost", "400"),
            ("HTTP/1.1\r\nx: y", "400"),
            ("HTTP/1.0\r\nx: y", "200"),
            ("HTTP/1.0\r\nhost: localhost\r\nhost: localhost", "400"),
        ] {
            let (answer, _) = ask_whole(addr, &format!("GET /livez {head}"), b"").await;
            assert_eq!(answer.split(' ').nth(1), Some(expected), "{head}: {answer}");
        }
        running.end().await;
    }
}

/// Sends a probe, and returns its status and duration.
async fn probe(addr: std::net::SocketAddr) -> (u16, Duration) {
    let started = Instant::now();
    let probe = harness::get(addr, "/livez");
    let (status, _) = tokio::time::timeout(harness::PATIENCE, probe)
        .await
        .expect("no answer");
    (status, started.elapsed())
}

/// Opens connections that send `sent` and read nothing.
async fn connections(addr: std::net::SocketAddr, n: usize, sent: &[u8]) -> Vec<TcpStream> {
    let mut streams = Vec::with_capacity(n);
    for _ in 0..n {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        // A page does not fit into what the kernel keeps for it.
        socket.set_recv_buffer_size(4096).expect("set");
        let mut stream = socket.connect(addr).await.expect("accepted");
        // One that was given up already.
        let _ = stream.write_all(sent).await;
        streams.push(stream);
    }
    streams
}

/// Clients that send nothing, send half a request, or do not read the page:
/// probes beside them are answered within a second each, and all such clients
/// are disconnected.
#[tokio::test(flavor = "multi_thread")]
async fn probes_are_answered_beside_clients_that_hang() {
    let running = harness::fake(Script::default(), &[]).await;
    let addr = running.worker.metrics_addr;
    let limits = std::fs::read_to_string("/proc/self/limits").expect("Linux");
    let files = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let files = files.and_then(|line| line.split_whitespace().next()?.parse().ok());
    // Both ends of each are in this process, with those of other tests.
    let files_max: usize = files.unwrap_or(usize::MAX);
    for (n, sent) in [
        (200, &b""[..]),
        (1000, b""),
        (200, b"GET /metrics HT"),
        (1000, b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx-half: "),
        (
            200,
            b"POST /livez HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nhalf",
        ),
        (200, b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    ] {
        let hanging = connections(addr, n.min(files_max / 2), sent).await;
        for _ in 0..5 {
            let (status, elapsed) = probe(addr).await;
            assert_eq!(status, 200);
            assert!(
                elapsed < Duration::from_secs(1),
                "{n} {sent:?}: {elapsed:?}"
            );
        }
        drop(hanging);
    }
    let silent = connections(addr, 64, b"").await;
    for mut stream in silent {
        let mut said = Vec::new();
        let ended = tokio::time::timeout(harness::PATIENCE, stream.read_to_end(&mut said)).await;
        let _ = ended.expect("it was cut");
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
