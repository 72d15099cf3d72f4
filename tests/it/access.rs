//! TLS and authentication, and limits of the worker's resources per client.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Stdio;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame};
use imagegpt::client::{Client, ConnectConfig};
use imagegpt::engine::fake::Script;
use imagegpt::proto::pb;
use imagegpt::proto::pb::image_gpt_service_client::ImageGptServiceClient;
use imagegpt::serve::worker::{Worker, WorkerEnded};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_types::StatusExt as _;
use tower::{Service as _, ServiceExt as _};

use crate::harness::{
    self, embed, fake_answer, seeded, tokens, until, until_in_flight, until_sample, vector,
};
use crate::process;

const TOKEN: &str = "0123456789abcdef";

/// Certificate authority, with a directory for its certificates.
struct Authority {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        std::fs::write(dir.path().join("ca.crt"), certificate.pem()).expect("written");
        let issuer = Issuer::new(params, key);
        let authority = Self { dir, issuer };
        authority.sign("server", 2031);
        authority.sign("client", 2031);
        authority
    }

    /// Writes NAME.crt and NAME.key, valid until the year `until`.
    fn sign(&self, name: &str, until: i32) {
        self.sign_for(name, 2000, until);
    }

    /// Writes NAME.crt and NAME.key, valid from one year until another.
    fn sign_for(&self, name: &str, from: i32, until: i32) {
        self.sign_as(name, &["localhost", "127.0.0.1"], (from, until));
    }

    /// Writes NAME.crt and NAME.key for these hosts.
    fn sign_as(&self, name: &str, hosts: &[&str], (from, until): (i32, i32)) {
        let names: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.not_before = rcgen::date_time_ymd(from, 1, 1);
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        std::fs::write(self.path(&format!("{name}.crt")), certificate.pem()).expect("written");
        std::fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).expect("written");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the settings of a client that trusts this authority.
    fn trusted(&self) -> ConnectConfig {
        ConnectConfig {
            tls_ca: Some(self.path("ca.crt")),
            ..Default::default()
        }
    }

    fn server_flags(&self) -> Vec<String> {
        let path = |name| self.path(name).display().to_string();
        [
            "--tls-cert",
            &path("server.crt"),
            "--tls-key",
            &path("server.key"),
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

async fn start(flags: &[impl AsRef<str>]) -> Worker {
    start_with(Script::default(), flags).await
}

async fn start_with(script: Script, flags: &[impl AsRef<str>]) -> Worker {
    let flags: Vec<&str> = flags.iter().map(AsRef::as_ref).collect();
    harness::fake_worker(script, &flags).await
}

async fn end(worker: Worker) {
    assert_eq!(worker.shutdown(harness::PATIENCE).await, WorkerEnded::Clean);
}

/// Calls GetModel over a new connection, and returns the model's name or the
/// error with its causes.
async fn call(worker: &Worker, scheme: &str, config: &ConnectConfig) -> Result<String, String> {
    let url = format!("{scheme}://{}", worker.grpc_addr);
    let call = async {
        let mut client = Client::connect(&url, config).await?;
        anyhow::Ok(client.model().await?.name)
    };
    call.await.map_err(|error| format!("{error:#}"))
}

async fn sample(worker: &Worker, series: &str) -> f64 {
    harness::sample(&harness::metrics(worker).await, series)
}

async fn channel(worker: &Worker) -> Channel {
    Channel::from_shared(harness::url(worker))
        .expect("a URL")
        .connect()
        .await
        .expect("a connection")
}

#[tokio::test]
async fn tls_works_and_nothing_else_does() {
    let (ours, others) = (Authority::new(), Authority::new());
    let worker = start(&ours.server_flags()).await;
    call(&worker, "https", &ours.trusted())
        .await
        .expect("a call");
    call(&worker, "http", &ConnectConfig::default())
        .await
        .expect_err("plaintext");
    call(&worker, "https", &others.trusted())
        .await
        .expect_err("a certificate of someone else");
    call(&worker, "https", &ConnectConfig::default())
        .await
        .expect_err("a certificate of nobody known");
    assert_eq!(
        sample(
            &worker,
            "imagegpt_connections_total{outcome=\"handshake_failed\"}"
        )
        .await,
        3.0
    );
    // 2031-01-01.
    let expiry = sample(&worker, "imagegpt_tls_certificate_expiry_timestamp_seconds").await;
    assert_eq!(expiry, 1_924_992_000.0);
    end(worker).await;
}

/// A client that offers http/1.1 alone, and one that offers nothing, are told
/// what the port serves.
#[tokio::test]
async fn http_1_over_tls_is_told_what_the_port_serves() {
    use tokio_rustls::rustls::pki_types::pem::PemObject as _;
    use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
    use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

    let ours = Authority::new();
    let worker = start(&ours.server_flags()).await;
    for offered in [&[&b"http/1.1"[..]][..], &[]] {
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(ours.path("ca.crt")).expect("a certificate");
        roots.add(ca).expect("a root");
        let provider = std::sync::Arc::new(crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = offered.iter().map(|name| name.to_vec()).collect();
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        let stream = TcpStream::connect(worker.grpc_addr)
            .await
            .expect("connected");
        let name = ServerName::try_from("localhost").expect("a name");
        let mut stream = connector.connect(name, stream).await.expect("TLS");
        let request = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";
        stream.write_all(request).await.expect("sent");
        let mut answer = Vec::new();
        let whole = stream.read_to_end(&mut answer);
        let read = tokio::time::timeout(harness::PATIENCE, whole).await;
        read.expect("closed").expect("read");
        let answer = String::from_utf8(answer).expect("text");
        assert!(answer.starts_with("HTTP/1.1 505 "), "{answer}");
        assert!(answer.contains("gRPC over HTTP/2"), "{answer}");
    }
    end(worker).await;
}

#[tokio::test]
async fn mutual_tls_asks_clients_for_a_certificate() {
    let (ours, others) = (Authority::new(), Authority::new());
    let mut flags = ours.server_flags();
    flags.extend([
        "--tls-client-ca".to_owned(),
        ours.path("ca.crt").display().to_string(),
    ]);
    let worker = start(&flags).await;
    let with = |authority: &Authority| ConnectConfig {
        tls_client_cert: Some(authority.path("client.crt")),
        tls_client_key: Some(authority.path("client.key")),
        ..ours.trusted()
    };
    call(&worker, "https", &with(&ours)).await.expect("a call");
    call(&worker, "https", &ours.trusted())
        .await
        .expect_err("no certificate");
    call(&worker, "https", &with(&others))
        .await
        .expect_err("a certificate of someone else");
    end(worker).await;
}

#[tokio::test]
async fn a_certificate_that_the_tokens_file_names_needs_no_token() {
    let ours = Authority::new();
    for name in ["mesh", "stranger"] {
        ours.sign_as(name, &[&format!("{name}.example")], (2000, 2031));
    }
    let tokens = ours.path("tokens");
    std::fs::write(&tokens, format!("mesh cert=mesh.example\n{TOKEN}\n")).expect("written");
    let mut flags = ours.server_flags();
    for (flag, path) in [
        ("--tls-client-ca", ours.path("ca.crt")),
        ("--auth-tokens-file", tokens),
    ] {
        flags.extend([flag.to_owned(), path.display().to_string()]);
    }
    let worker = start(&flags).await;
    std::fs::write(ours.path("token"), TOKEN).expect("written");
    let with = |name: &str, token: bool| ConnectConfig {
        tls_client_cert: Some(ours.path(&format!("{name}.crt"))),
        tls_client_key: Some(ours.path(&format!("{name}.key"))),
        token_file: token.then(|| ours.path("token")),
        ..ours.trusted()
    };
    call(&worker, "https", &with("mesh", false))
        .await
        .expect("no token");
    call(&worker, "https", &with("mesh", true))
        .await
        .expect("the same");
    let refused = call(&worker, "https", &with("stranger", false)).await;
    let refused = refused.expect_err("no token");
    assert!(refused.starts_with("UNAUTHENTICATED"), "{refused}");
    call(&worker, "https", &with("stranger", true))
        .await
        .expect("a token");
    let page = harness::metrics(&worker).await;
    let of_mesh = r#"imagegpt_requests_total{method="GetModel",code="OK",caller="mesh"}"#;
    assert_eq!(harness::sample(&page, of_mesh), 2.0);
    let of_others = r#"imagegpt_requests_total{method="GetModel",code="OK"}"#;
    assert_eq!(harness::sample(&page, of_others), 1.0);
    assert!(!page.contains("stranger"), "a stranger's name is no label");
    end(worker).await;
}

/// Certificates are replaced as Kubernetes replaces a secret: by a symbolic
/// link to another directory.
#[tokio::test]
async fn a_replaced_certificate_meets_new_connections_and_leaves_old_ones() {
    let (old, new) = (Authority::new(), Authority::new());
    new.sign("server", 2032);
    let mount = tempfile::tempdir().expect("a folder");
    let swap = |to: &Path| {
        symlink(to, mount.path().join("next")).expect("a link");
        std::fs::rename(mount.path().join("next"), mount.path().join("now")).expect("swapped");
    };
    swap(old.dir.path());
    let path = |name: &str| mount.path().join("now").join(name).display().to_string();
    let flags = [
        "--tls-cert",
        &path("server.crt"),
        "--tls-key",
        &path("server.key"),
    ];
    let worker = start(&flags).await;
    let url = format!("https://{}", worker.grpc_addr);
    let mut before = Client::connect(&url, &old.trusted())
        .await
        .expect("a connection");
    before.model().await.expect("a call");

    // One that cannot be used changes nothing.
    let broken = tempfile::tempdir().expect("a folder");
    std::fs::write(broken.path().join("server.crt"), "nothing").expect("written");
    swap(broken.path());
    let failed = "imagegpt_reload_failed{file=\"certificate\"}";
    until_sample(&worker, failed, |n| n == 1.0).await;
    call(&worker, "https", &old.trusted())
        .await
        .expect("the old one");

    swap(new.dir.path());
    until_sample(
        &worker,
        "imagegpt_reloads_total{file=\"certificate\"}",
        |n| n == 1.0,
    )
    .await;
    assert_eq!(sample(&worker, failed).await, 0.0);
    call(&worker, "https", &new.trusted())
        .await
        .expect("the new one");
    call(&worker, "https", &old.trusted())
        .await
        .expect_err("the old one is gone");
    before.model().await.expect("the old connection lives on");
    // 2032-01-01.
    let expiry = sample(&worker, "imagegpt_tls_certificate_expiry_timestamp_seconds").await;
    assert_eq!(expiry, 1_956_528_000.0);
    drop(before);
    end(worker).await;
}

/// A certificate that clients would refuse does not replace one that they take.
#[tokio::test]
async fn a_replaced_certificate_must_be_valid_now() {
    let ours = Authority::new();
    let worker = start(&ours.server_flags()).await;
    let failed = "imagegpt_reload_failed{file=\"certificate\"}";
    let good = ["crt", "key"].map(|end| {
        let path = ours.path(&format!("server.{end}"));
        std::fs::read(path).expect("read")
    });
    for (from, until) in [(2001, 2002), (2100, 2101)] {
        ours.sign_for("server", from, until);
        until_sample(&worker, failed, |n| n == 1.0).await;
        call(&worker, "https", &ours.trusted())
            .await
            .expect("the old one");
        // 2031-01-01.
        let expiry = sample(&worker, "imagegpt_tls_certificate_expiry_timestamp_seconds").await;
        assert_eq!(expiry, 1_924_992_000.0);
        for (end, content) in ["crt", "key"].iter().zip(&good) {
            std::fs::write(ours.path(&format!("server.{end}")), content).expect("written");
        }
        until_sample(&worker, failed, |n| n == 0.0).await;
    }
    let reloads = "imagegpt_reloads_total{file=\"certificate\"}";
    assert_eq!(sample(&worker, reloads).await, 0.0);
    ours.sign("server", 2032);
    until_sample(&worker, reloads, |n| n == 1.0).await;
    call(&worker, "https", &ours.trusted())
        .await
        .expect("the new one");
    end(worker).await;
}

#[tokio::test]
async fn calls_need_a_token_and_probes_do_not() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).expect("written");
        path
    };
    let accepted = file("tokens", &format!("# ours\nanother-{TOKEN}\n{TOKEN}\n"));
    let worker = start(&["--auth-tokens-file", accepted.to_str().expect("UTF-8")]).await;
    let with = |name: &str, token: &str| ConnectConfig {
        token_file: Some(file(name, token)),
        ..Default::default()
    };
    let right = with("right", TOKEN);
    call(&worker, "http", &right).await.expect("a call");
    let refusal = |outcome: Result<String, String>| outcome.expect_err("a refusal");
    let wrong = refusal(call(&worker, "http", &with("wrong", "0123456789abcdeF")).await);
    assert_eq!(
        wrong,
        "UNAUTHENTICATED: authorization: the bearer token is not one that the worker accepts"
    );
    // A byte order mark, and the worker's own file with names.
    let marked = with("marked", &format!("\u{feff}{TOKEN}\n"));
    call(&worker, "http", &marked).await.expect("a call");
    let named = refusal(call(&worker, "http", &with("named", &format!("a {TOKEN}"))).await);
    assert!(
        named.starts_with("--token-file") && named.contains("a token has no spaces"),
        "{named}"
    );
    assert!(!named.contains(TOKEN), "{named}");
    let missing = refusal(call(&worker, "http", &ConnectConfig::default()).await);
    assert!(
        missing.starts_with("UNAUTHENTICATED: authorization: the call has no"),
        "{missing}"
    );
    let refused = "imagegpt_requests_total{method=\"GetModel\",code=\"UNAUTHENTICATED\"}";
    assert_eq!(sample(&worker, refused).await, 2.0);

    let channel = channel(&worker).await;
    HealthClient::new(channel.clone())
        .check(HealthCheckRequest::default())
        .await
        .expect("probes need none");
    let error = ServerReflectionClient::new(channel.clone())
        .server_reflection_info(tokio_stream::pending())
        .await
        .expect_err("reflection needs one");
    assert_eq!(error.code(), Code::Unauthenticated);
    // The request never ends: whoever waited for it would wait for ever.
    let error = ImageGptServiceClient::new(channel)
        .embed_stream(tokio_stream::pending())
        .await
        .expect_err("no token");
    assert_eq!(error.code(), Code::Unauthenticated);
    let info = error.get_details_error_info().expect("an ErrorInfo");
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        ("UNAUTHENTICATED", "imagegpt.v1")
    );

    // A replaced token counts at once for open connections, too.
    let url = harness::url(&worker);
    let mut open = Client::connect(&url, &right).await.expect("a connection");
    open.model().await.expect("a call");
    file("tokens", &format!("{TOKEN}-new"));
    until_sample(&worker, "imagegpt_reloads_total{file=\"tokens\"}", |n| {
        n == 1.0
    })
    .await;
    open.model().await.expect_err("not a token any more");
    call(&worker, "http", &with("new", &format!("{TOKEN}-new")))
        .await
        .expect("the new one");
    drop(open);
    end(worker).await;
}

/// Starts a worker whose runs wait until the gate opens.
async fn gated(flags: &[&str]) -> (Worker, crossbeam_channel::Sender<()>) {
    let (open, script) = harness::gated();
    let flags = [flags, &["--max-batch-size", "1"]].concat();
    (start_with(script, &flags).await, open)
}

const REFUSED: &str = "imagegpt_connections_total{outcome=\"refused\"}";
const SENT_AWAY: &str = "imagegpt_connections_total{outcome=\"sent_away\"}";
const OPEN: &str = "imagegpt_connections_open";

#[tokio::test]
async fn one_connection_too_many_is_closed_at_once_where_all_have_calls() {
    let (worker, open) = gated(&["--connections-max", "2"]).await;
    let mut calls = Vec::new();
    for n in 1..=2 {
        let mut client = harness::connect(&worker).await;
        let ids = seeded(n);
        calls.push(tokio::spawn(async move {
            let answer = client.embed(embed(vec![tokens(ids.clone())])).await;
            let results = answer.expect("an answer").into_inner().results;
            assert_eq!(vector(&results[0]).expect("a vector"), fake_answer(&ids));
            client
        }));
        until_in_flight(&worker, n as usize).await;
    }
    let mut third = TcpStream::connect(worker.grpc_addr)
        .await
        .expect("accepted");
    let read = third.read(&mut [0]).await;
    assert!(matches!(read, Ok(0) | Err(_)), "closed: {read:?}");
    assert_eq!(sample(&worker, REFUSED).await, 1.0);
    assert_eq!(sample(&worker, OPEN).await, 2.0);
    assert_eq!(sample(&worker, "imagegpt_connections_max").await, 2.0);

    let mut clients = Vec::new();
    for call in calls {
        open.send(()).expect("the engine waits");
        clients.push(call.await.expect("no panic"));
    }
    clients.pop();
    until_sample(&worker, OPEN, |n| n == 1.0).await;
    call(&worker, "http", &ConnectConfig::default())
        .await
        .expect("there is a place again");
    drop(clients);
    end(worker).await;
}

/// Opens an HTTP/2 connection that makes no calls, answers pings, and stays
/// open after GOAWAY.
async fn lingers(worker: &Worker) -> tokio::task::JoinHandle<Vec<u8>> {
    let stream = TcpStream::connect(worker.grpc_addr).await;
    let mut stream = stream.expect("accepted");
    tokio::spawn(async move {
        let settings_frame = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let hello = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings_frame].concat();
        // Whoever is cut at once cannot say even that.
        let _ = stream.write_all(&hello).await;
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said).await;
        said
    })
}

/// New clients are admitted even if silent or nearly silent connections hold
/// all places.
#[tokio::test]
async fn who_has_no_call_leaves_for_who_waits() {
    let worker = start(&["--connections-max", "8"]).await;
    let mut silent = Vec::new();
    let mut idle = Vec::new();
    for _ in 0..4 {
        silent.push(
            TcpStream::connect(worker.grpc_addr)
                .await
                .expect("accepted"),
        );
        idle.push(lingers(&worker).await);
    }
    until_sample(&worker, OPEN, |n| n == 8.0).await;
    let mut newcomers = Vec::new();
    for _ in 0..6 {
        let started = Instant::now();
        newcomers.push(newcomer(&worker).await);
        let taken = started.elapsed();
        assert!(taken < Duration::from_secs(10), "{taken:?}");
    }
    assert_eq!(sample(&worker, SENT_AWAY).await, 6.0);
    drop((silent, newcomers));
    for lingering in idle {
        lingering.abort();
    }
    end(worker).await;
}

/// Clients with an idle connection that is used now and then, with a call in
/// progress, and with no call ever.
#[tokio::test]
async fn the_least_recently_used_leaves_and_no_call_is_lost() {
    let (worker, open) = gated(&["--connections-max", "3"]).await;
    let lingering = lingers(&worker).await;
    let mut rested = harness::connect(&worker).await;
    rested
        .get_model(pb::GetModelRequest {})
        .await
        .expect("a call");
    let mut busy = harness::connect(&worker).await;
    let ids = seeded(5);
    let request = embed(vec![tokens(ids.clone())]);
    let held = tokio::spawn(async move { busy.embed(request).await });
    until_in_flight(&worker, 1).await;

    // The one that never had a call goes first, and is told, then cut.
    let mut newcomers = vec![newcomer(&worker).await];
    let said = lingering.await.expect("no panic");
    assert!(
        frames(&said).any(|frame| frame == 7),
        "told to go away: {said:?}"
    );
    assert_eq!(sample(&worker, SENT_AWAY).await, 1.0);
    // The one that is used now and then finds a new connection by itself.
    newcomers.push(newcomer(&worker).await);
    assert_eq!(sample(&worker, SENT_AWAY).await, 2.0);
    until(&worker, "a call over a new connection", async || {
        rested.get_model(pb::GetModelRequest {}).await.is_ok()
    })
    .await;
    // The one with a call stays, however many come.
    open.send(()).expect("the engine waits");
    let response = held.await.expect("no panic").expect("an answer");
    let results = response.into_inner().results;
    assert_eq!(vector(&results[0]).expect("a vector"), fake_answer(&ids));
    drop((newcomers, rested));
    end(worker).await;
}

/// Connects a new client and makes a call.
async fn newcomer(worker: &Worker) -> ImageGptServiceClient<Channel> {
    let mut called = None;
    until(worker, "a newcomer is let in", async || {
        if let Ok(mut client) = ImageGptServiceClient::connect(harness::url(worker)).await
            && client.get_model(pb::GetModelRequest {}).await.is_ok()
        {
            called = Some(client);
        }
        called.is_some()
    })
    .await;
    called.expect("a client")
}

/// Health checks need no token, and a connection without a token keeps no
/// place.
#[tokio::test]
async fn watches_and_checks_keep_no_place_from_who_has_a_token() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("tokens");
    std::fs::write(&file, TOKEN).expect("written");
    let file = file.to_str().expect("UTF-8");
    let worker = start(&["--connections-max", "4", "--auth-tokens-file", file]).await;
    let mut watches = Vec::new();
    for _ in 0..4 {
        let mut health = HealthClient::new(channel(&worker).await);
        let watch = health.watch(HealthCheckRequest::default()).await;
        let mut watch = watch.expect("a watch").into_inner();
        watch.message().await.expect("a status");
        health
            .check(HealthCheckRequest::default())
            .await
            .expect("a status");
        watches.push((health, watch));
    }
    let path = dir.path().join("token");
    std::fs::write(&path, TOKEN).expect("written");
    let config = ConnectConfig {
        token_file: Some(path),
        ..Default::default()
    };
    let started = Instant::now();
    until(&worker, "who has a token is let in", async || {
        call(&worker, "http", &config).await.is_ok()
    })
    .await;
    assert!(started.elapsed() < Duration::from_secs(20));
    assert!(sample(&worker, SENT_AWAY).await >= 1.0);
    drop(watches);
    end(worker).await;
}

#[tokio::test]
async fn watches_and_reflection_have_limits_on_a_connection() {
    let worker = start(&[] as &[&str]).await;
    let shared = channel(&worker).await;
    let mut health = HealthClient::new(shared.clone());
    let mut watches = Vec::new();
    for _ in 0..8 {
        let watch = health.watch(HealthCheckRequest::default()).await;
        watches.push(watch.expect("a watch").into_inner());
    }
    let error = health.watch(HealthCheckRequest::default()).await;
    let error = error.expect_err("one too many");
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert_eq!(
        error.message(),
        "health: watches: 8 are in progress on this connection, which is the limit; end one, or \
         use Check"
    );
    health
        .check(HealthCheckRequest::default())
        .await
        .expect("checks go on");
    let mut other = HealthClient::new(channel(&worker).await);
    other
        .watch(HealthCheckRequest::default())
        .await
        .expect("another connection has its own");
    watches.pop();
    until(&worker, "a watch that ended counts no more", async || {
        health.watch(HealthCheckRequest::default()).await.is_ok()
    })
    .await;

    let mut reflection = ServerReflectionClient::new(shared);
    let mut streams = Vec::new();
    for _ in 0..4 {
        let questions = tokio_stream::pending::<ServerReflectionRequest>();
        let stream = reflection.server_reflection_info(questions).await;
        streams.push(stream.expect("a stream"));
    }
    let questions = tokio_stream::pending::<ServerReflectionRequest>();
    let error = reflection.server_reflection_info(questions).await;
    let error = error.expect_err("one too many");
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert!(
        error.message().contains("reflection: streams: 4 are"),
        "{error}"
    );
    drop((watches, streams, health, other, reflection));
    end(worker).await;
}

#[tokio::test]
async fn an_address_has_a_limit_of_its_own() {
    let worker = start(&["--connections-per-address-max", "2"]).await;
    let mut inside = vec![newcomer(&worker).await, newcomer(&worker).await];
    let mut third = TcpStream::connect(worker.grpc_addr)
        .await
        .expect("accepted");
    let read = third.read(&mut [0]).await;
    assert!(matches!(read, Ok(0) | Err(_)), "closed: {read:?}");
    let refused = "imagegpt_connections_total{outcome=\"refused_address\"}";
    assert_eq!(sample(&worker, refused).await, 1.0);
    // From another address of this machine.
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket
        .bind("127.0.0.2:0".parse().expect("an address"))
        .expect("bound");
    let mut other = socket.connect(worker.grpc_addr).await.expect("accepted");
    let hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    other.write_all(hello).await.expect("sent");
    assert!(other.read(&mut [0]).await.expect("served") > 0);
    inside.pop();
    until_sample(&worker, OPEN, |n| n == 2.0).await;
    inside.push(newcomer(&worker).await);
    drop((inside, other));
    end(worker).await;
}

/// Checks that silent connections keep no client out, and are closed after the
/// time limit of a handshake.
async fn silence(scheme: &str, config: &ConnectConfig, flags: &[String]) {
    let flags = [flags, &["--connections-max".to_owned(), "4".to_owned()]].concat();
    let worker = start(&flags).await;
    let url = format!("{scheme}://{}", worker.grpc_addr);
    let mut inside = Client::connect(&url, config).await.expect("a connection");
    inside.model().await.expect("a call");
    let mut silent = Vec::new();
    for _ in 0..3 {
        let stream = TcpStream::connect(worker.grpc_addr).await;
        silent.push(stream.expect("accepted"));
    }
    until_sample(&worker, OPEN, |n| n == 4.0).await;
    // More than half of the places have had no call, so one is had at once.
    call(&worker, scheme, config).await.expect("a call");
    assert_eq!(sample(&worker, SENT_AWAY).await, 1.0);
    inside.model().await.expect("a call");
    let failed = "imagegpt_connections_total{outcome=\"handshake_failed\"}";
    until_sample(&worker, failed, |n| n == 2.0).await;
    for mut stream in silent {
        // After what the server had to say, which ends by an end or an error.
        let mut said = Vec::new();
        let read = stream.read_to_end(&mut said);
        let ended = tokio::time::timeout(harness::PATIENCE, read).await;
        let _ = ended.expect("it was cut");
    }
    drop(inside);
    end(worker).await;
}

#[tokio::test]
async fn silent_connections_are_cut() {
    let ours = Authority::new();
    let (plain, trusted, flags) = (
        ConnectConfig::default(),
        ours.trusted(),
        ours.server_flags(),
    );
    // Together, since each waits for the ten seconds of a handshake.
    tokio::join!(
        silence("http", &plain, &[]),
        silence("https", &trusted, &flags),
    );
}

/// A client that hangs after its handshake, as behind an unplugged cable, is
/// disconnected and its work is dropped; a client that answers pings stays.
#[tokio::test]
async fn who_does_not_answer_pings_is_cut() {
    let worker = start(&["--keepalive-interval", "1s", "--keepalive-timeout", "1s"]).await;
    let url = harness::url(&worker);
    let mut quiet = Client::connect(&url, &ConnectConfig::default())
        .await
        .expect("a connection");
    quiet.model().await.expect("a call");

    let mut hung = TcpStream::connect(worker.grpc_addr)
        .await
        .expect("accepted");
    let settings_frame = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let hello = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings_frame].concat();
    hung.write_all(&hello).await.expect("sent");
    until_sample(&worker, "imagegpt_connections_open", |n| n == 2.0).await;
    let began = Instant::now();
    let mut said = Vec::new();
    let read = hung.read_to_end(&mut said);
    let ended = tokio::time::timeout(harness::PATIENCE, read).await;
    ended.expect("it was cut").expect("closed in order");
    // Not for another reason, such as the limit on handshakes.
    let pings = frames(&said).filter(|frame| *frame == 6).count();
    assert_eq!(pings, 1, "{said:?}");
    let taken = began.elapsed();
    assert!(taken >= Duration::from_secs(1), "{taken:?}");

    until_sample(&worker, "imagegpt_connections_open", |n| n == 1.0).await;
    quiet.model().await.expect("a call");
    let closed = "imagegpt_connections_total{outcome=\"closed\"}";
    // It would have come again if it had been cut.
    until_sample(&worker, closed, |n| n == 1.0).await;
    drop(quiet);
    end(worker).await;
}

/// Returns the types of HTTP/2 frames.
fn frames(mut bytes: &[u8]) -> impl Iterator<Item = u8> {
    std::iter::from_fn(move || {
        let [a, b, c, frame, ..] = *bytes else {
            return None;
        };
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        bytes = bytes.get(9 + length..)?;
        Some(frame)
    })
}

#[tokio::test]
async fn headers_have_a_limit() {
    let worker = start(&["--header-bytes-max", "1KiB"]).await;
    let mut client = ImageGptServiceClient::new(channel(&worker).await);
    let request = |n_bytes: usize| {
        let mut request = Request::new(pb::GetModelRequest {});
        let value = "x".repeat(n_bytes).parse().expect("ascii");
        request.metadata_mut().insert("x-long", value);
        request
    };
    client.get_model(request(100)).await.expect("a call");
    client.get_model(request(2000)).await.expect_err("too long");
    client
        .get_model(request(100))
        .await
        .expect("the connection lives on");
    drop(client);
    end(worker).await;
}

/// A call is in progress when its connection gets GOAWAY, while another client
/// makes calls.
#[tokio::test]
async fn an_aged_connection_goes_away_and_no_call_is_lost() {
    let (worker, open) = gated(&["--max-connection-age", "1s"]).await;
    let channel = channel(&worker).await;
    let mut client = ImageGptServiceClient::new(channel.clone());
    let ids = seeded(7);
    let request = embed(vec![tokens(ids.clone())]);
    let held = tokio::spawn(async move { client.embed(request).await });
    until_in_flight(&worker, 1).await;
    let mut watch = HealthClient::new(channel)
        .watch(HealthCheckRequest::default())
        .await
        .expect("a watch")
        .into_inner();
    watch.message().await.expect("a status");
    let goodbye = watch.message().await.expect_err("the connection's age");
    assert_eq!(goodbye.code(), Code::Unavailable);

    // Its connection has gone away, but for the call.
    let mut client = harness::connect(&worker).await;
    let closed = "imagegpt_connections_total{outcome=\"closed\"}";
    let mut n_calls = 0;
    while sample(&worker, closed).await < 2.0 {
        let answer = client.get_model(pb::GetModelRequest {}).await;
        if let Err(status) = answer {
            // The client may choose a connection the moment it closes: then hyper
            // gives the call back unsent, and tonic does not send it again.
            let unsent = format!("{status:?}").contains("connection closed");
            assert!(unsent, "no call is lost: {status}");
        }
        n_calls += 1;
        assert!(n_calls < 1_000_000, "connections never age");
    }
    open.send(()).expect("the engine waits");
    let response = held
        .await
        .expect("no panic")
        .expect("an answer")
        .into_inner();
    assert_eq!(
        vector(&response.results[0]).expect("a vector"),
        fake_answer(&ids)
    );
    drop((client, watch, open));
    end(worker).await;
}

/// Message of 1,000 bytes of which only the first few arrive.
struct Trickle(Vec<u8>);

impl Body for Trickle {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.0.pop() {
            Some(byte) => Poll::Ready(Some(Ok(Frame::data(vec![byte].into())))),
            None => Poll::Pending,
        }
    }
}

#[tokio::test]
async fn a_request_that_trickles_in_is_ended() {
    let worker = start(&["--request-timeout", "1s"]).await;
    let channel = channel(&worker).await;
    // Probes need no token, so they must not be a way in for this either.
    tokio::join!(
        trickle(channel.clone(), "/imagegpt.v1.ImageGptService/Embed"),
        trickle(channel.clone(), "/grpc.health.v1.Health/Check"),
    );
    let error = HealthClient::new(channel)
        .check(HealthCheckRequest {
            service: "x".repeat(5000),
        })
        .await
        .expect_err("no name is so long");
    assert_eq!(error.code(), Code::OutOfRange);
    end(worker).await;
}

async fn trickle(mut channel: Channel, path: &str) {
    // Reversed: a frame that is not compressed and has 1,000 bytes.
    let body = Trickle(vec![0, 0, 0, 0xe8, 3, 0, 0, 0]);
    let request = http::Request::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(body))
        .expect("a request");
    let started = Instant::now();
    let response = channel
        .ready()
        .await
        .expect("a connection")
        .call(request)
        .await
        .expect("a response");
    let status = Status::from_header_map(response.headers()).expect("a status");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(
        status.message().contains("within 1s (--request-timeout)"),
        "{status:?}"
    );
    let info = status.get_details_error_info().expect("an ErrorInfo");
    assert_eq!(info.reason, "REQUEST_SLOW");
    assert!(started.elapsed() >= Duration::from_secs(1));
}

/// Wrong flags and files end the program with exit code 2 and one sentence.
#[test]
fn what_is_wrong_is_told_at_start() {
    let dir = tempfile::tempdir().expect("a folder");
    let short = dir.path().join("short");
    std::fs::write(&short, "hunter2").expect("written");
    let short = short.to_str().expect("UTF-8");
    let check = |flags: &[&str], expected: &str| {
        let output = process::program()
            .args(["serve", "--metrics-listen", "127.0.0.1:0", "--model"])
            .arg(harness::model_dir("micro"))
            .args(flags)
            .stdin(Stdio::null())
            .output()
            .expect("the program");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {text}");
        assert!(text.contains(expected), "{flags:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{flags:?}: {text}");
        assert!(!text.contains("hunter2"), "{text}");
    };
    check(
        &["--listen", "0.0.0.0:0"],
        "give --tls-cert and --tls-key (and --tls-client-ca, so that clients need a certificate), \
         or --auth-tokens-file, or --insecure",
    );
    check(
        &[
            "--listen",
            "127.0.0.1:0",
            "--tls-cert",
            "none",
            "--tls-key",
            "none",
        ],
        "imagegpt: --tls-cert none cannot be read: No such file or directory",
    );
    check(
        &["--listen", "127.0.0.1:0", "--auth-tokens-file", short],
        "line 1: the token has 7 characters; make it 16 or more",
    );
}
