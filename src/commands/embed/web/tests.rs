use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

const SHORT: Duration = Duration::from_secs(5);

#[test]
fn rests_double_up_to_a_bound() {
    let rests: Vec<u128> = RESTS.build().take(7).map(|rest| rest.as_millis()).collect();
    assert_eq!(rests, [500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
}

/// Starts a server that answers each connection with the next of these answers.
async fn server(answers: &[&'static str]) -> Url {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/a.png", listener.local_addr().unwrap());
    let answers = answers.to_vec();
    tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    url.parse().unwrap()
}

async fn read_from(answers: &[&'static str], patience: Duration) -> Result<WebAnswer, ImageFault> {
    let url = server(answers).await;
    read(&client(), &url, 4, patience).await
}

const TIMES: WebTimes = WebTimes {
    connect: SHORT,
    request: SHORT,
};

fn client() -> WebClient {
    WebClient::new(WebTrust::default(), TIMES, AddressBook::default()).unwrap()
}

fn refusal(status: u16) -> Failure {
    let status = StatusCode::from_u16(status).unwrap();
    refused(status, &HeaderMap::new(), SystemTime::now())
}

#[test]
fn what_a_server_says_lasts_or_passes() {
    let check = |status, expected: GrpcCode, lasts: bool| match refusal(status) {
        Failure::Lasting(fault) => assert_eq!((fault.code, true), (expected, lasts)),
        Failure::Passing(fault, _) => assert_eq!((fault.code, false), (expected, lasts)),
    };
    check(400, GrpcCode::FailedPrecondition, true);
    check(401, GrpcCode::PermissionDenied, true);
    check(403, GrpcCode::PermissionDenied, true);
    check(404, GrpcCode::NotFound, true);
    check(410, GrpcCode::NotFound, true);
    check(451, GrpcCode::FailedPrecondition, true);
    check(408, GrpcCode::Unavailable, false);
    check(429, GrpcCode::Unavailable, false);
    check(500, GrpcCode::Unavailable, false);
    check(503, GrpcCode::Unavailable, false);
    let headers = HeaderMap::from_iter([(RETRY_AFTER, "7".parse().unwrap())]);
    let busy = StatusCode::SERVICE_UNAVAILABLE;
    let Failure::Passing(_, asked) = refused(busy, &headers, SystemTime::now()) else {
        panic!("a busy server may be free again");
    };
    assert_eq!(asked, Some(Duration::from_secs(7)));
}

#[test]
fn no_server_can_ask_for_more_than_the_longest_rest() {
    let now = httpdate::parse_http_date("Wed, 21 Oct 2015 07:28:00 GMT").unwrap();
    let check = |text: &str, expected| assert_eq!(retry_after(text, now), expected, "{text}");
    let seconds = |n| Some(Duration::from_secs(n));
    check("0", seconds(0));
    check(" 120 ", seconds(120));
    check("Wed, 21 Oct 2015 07:30:00 GMT", seconds(120));
    check("Wed, 21 Oct 2015 07:00:00 GMT", seconds(0));
    for longest in [
        "86401",
        "18446744073709551615",
        "18446744073709551616",
        &"9".repeat(400),
        "Fri, 31 Dec 9999 23:59:59 GMT",
    ] {
        check(longest, Some(RETRY_AFTER_MAX));
    }
    for nothing in [
        "",
        "-1",
        "+1",
        "1e300",
        "1.5",
        "NaN",
        "soon",
        "Wed, 99 Oct 2015",
    ] {
        check(nothing, None);
    }
}

#[tokio::test]
async fn a_rest_of_ages_is_an_error_and_no_panic() {
    let busy = "HTTP/1.1 503 Busy\r\nretry-after: 18446744073709551615\r\n\
                content-length: 0\r\nconnection: close\r\n\r\n";
    let got = read_from(&[busy], SHORT).await.unwrap_err();
    assert_eq!(got.code, GrpcCode::Unavailable);
    assert!(got.message.contains("(--url-patience)"), "{}", got.message);
}

#[tokio::test]
async fn what_passes_is_asked_again_and_what_lasts_is_not() {
    let busy = "HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let cut = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\na";
    let image = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc";
    let gone = "HTTP/1.1 410 Gone\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let got = read_from(&[busy, cut, image], SHORT).await;
    assert_eq!(got, Ok(WebAnswer::Image(Bytes::from_static(b"abc"))));
    let got = read_from(&[gone, image], SHORT).await.unwrap_err();
    assert_eq!(got.message, "the server answered 410 Gone");
    // The rest that the server asks for is longer than the patience.
    let got = read_from(&[busy, image], REST_MIN / 2).await.unwrap_err();
    assert_eq!(got.code, GrpcCode::Unavailable);
    assert!(got.message.contains("(--url-patience)"), "{}", got.message);
}

#[tokio::test]
async fn what_is_too_large_is_not_read_to_its_end() {
    let long = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\n";
    assert_eq!(read_from(&[long], SHORT).await, Ok(WebAnswer::TooLarge(5)));
    // An image whose length no header states.
    let stream = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabcde";
    assert_eq!(
        read_from(&[stream], SHORT).await,
        Ok(WebAnswer::TooLarge(5))
    );
}

#[tokio::test]
async fn a_server_that_is_not_there_may_come_and_a_host_that_nobody_knows_not() {
    let client = Arc::new(client());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    drop(listener);
    let failure = |url: Url| {
        let client = Arc::clone(&client);
        async move { attempt(&client, &url, 4).await.unwrap_err() }
    };
    let refused = failure(url.parse().unwrap()).await;
    assert!(
        matches!(
            refused,
            Failure::Passing(
                ImageFault {
                    code: GrpcCode::Unavailable,
                    ..
                },
                None
            )
        ),
        "{refused:?}"
    );
    // Without a name server the host counts as one that may be found later.
    let unknown = failure("http://nowhere.invalid/".parse().unwrap()).await;
    assert!(
        matches!(
            &unknown,
            Failure::Lasting(ImageFault {
                code: GrpcCode::NotFound,
                ..
            }) | Failure::Passing(
                ImageFault {
                    code: GrpcCode::Unavailable,
                    ..
                },
                None
            )
        ),
        "{unknown:?}"
    );
}

/// Makes a network of loopback addresses: some count as public, some as
/// link-local, and a table gives each host name its address.
fn network() -> AddressBook {
    use std::net::{IpAddr, SocketAddr};

    struct Names;
    impl reqwest::dns::Resolve for Names {
        fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
            let last = match name.as_str() {
                "public.test" | "rebound.test" => 2,
                "metadata.test" => 3,
                _ => 1,
            };
            Box::pin(async move {
                let socket = SocketAddr::from(([127, 0, 0, last], 0));
                Ok(Box::new(std::iter::once(socket)) as reqwest::dns::Addrs)
            })
        }
    }
    let scope = |address: IpAddr| match address {
        IpAddr::V4(address) if address.octets()[3] == 2 => AddressScope::Public,
        IpAddr::V4(address) if address.octets()[3] == 3 => AddressScope::LinkLocal,
        _ => AddressScope::Private,
    };
    let names = Arc::new(Names);
    AddressBook { names, scope }
}

/// Starts servers at all three addresses, on one port: `/to/URL` redirects to URL,
/// `/code/N/URL` does so with status N, and every other path is an image.
async fn servers() -> u16 {
    async fn serve(listener: TcpListener) {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let n = stream.read(&mut request).await.unwrap();
            let request = String::from_utf8_lossy(&request[..n]).into_owned();
            let path = request.split(' ').nth(1).unwrap_or_default();
            let (status, target) = match path.strip_prefix("/code/") {
                Some(rest) => rest.split_once('/').unwrap(),
                None => ("302", path.strip_prefix("/to/").unwrap_or_default()),
            };
            let answer = if target.is_empty() {
                "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n".to_owned()
            } else {
                format!("HTTP/1.1 {status} Moved\r\nlocation: {target}\r\ncontent-length: 0\r\n")
            };
            let body = if target.is_empty() { "abc" } else { "" };
            let answer = format!("{answer}connection: close\r\n\r\n{body}");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    }
    let first = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = first.local_addr().unwrap().port();
    tokio::spawn(serve(first));
    for last in 2..=3 {
        let listener = TcpListener::bind((std::net::Ipv4Addr::new(127, 0, 0, last), port))
            .await
            .unwrap();
        tokio::spawn(serve(listener));
    }
    port
}

async fn got(trust: WebTrust, url: &str) -> Result<(), String> {
    let client = WebClient::new(trust, TIMES, network()).unwrap();
    match read(&client, &url.parse().unwrap(), 4, SHORT).await {
        Ok(answer) => {
            assert_eq!(answer, WebAnswer::Image(Bytes::from_static(b"abc")));
            Ok(())
        }
        Err(fault) => {
            assert_eq!(
                fault.code,
                GrpcCode::FailedPrecondition,
                "{}",
                fault.message
            );
            Err(fault.message)
        }
    }
}

#[tokio::test]
async fn a_public_address_leads_to_public_ones_only() {
    let port = servers().await;
    let at = |host: &str| format!("http://{host}:{port}");
    let (public, private, metadata) = (at("public.test"), at("in.test"), at("metadata.test"));
    let trust = WebTrust::default();
    for allowed in [
        format!("{public}/a"),
        format!("{private}/a"),
        format!("{public}/to/{public}/a"),
        format!("{private}/to/{private}/a"),
        format!("{private}/to/{public}/to/{public}/a"),
        format!("{public}/to//a"),
    ] {
        assert_eq!(got(trust, &allowed).await, Ok(()), "{allowed}");
    }
    for code in [301, 302, 303, 307, 308] {
        let url = format!("{public}/code/{code}/{private}/a");
        let why = got(trust, &url).await.unwrap_err();
        assert!(
            why.starts_with(&format!(
                "{private}/a leads to 127.0.0.1, a private address"
            )) && why.contains("public.test"),
            "{why}"
        );
    }
    for refused in [
        format!("{public}/to/{}/a", at("127.0.0.1")),
        format!("{public}/to/{}/a", at("2130706433")),
        format!("{public}/to/{}/a", at("0x7f.1")),
        format!("{public}/to/{}/a", at("[::1]")),
        format!("{public}/to/{public}/to/{private}/a"),
        format!("{private}/to/{public}/to/{private}/a"),
        format!("{public}/to/{metadata}/a"),
    ] {
        let why = got(trust, &refused).await.unwrap_err();
        assert!(why.contains("address, to which"), "{why}");
    }
    for (lasts, why) in [
        (format!("{public}/to/ftp://{port}/a"), "neither http:// nor"),
        (
            format!("{public}/to/http://[::/a"),
            "without a usable address",
        ),
    ] {
        let got = got(trust, &lasts).await.unwrap_err();
        assert!(got.contains(why), "{got}");
    }
}

#[tokio::test]
async fn link_local_addresses_and_private_ones_have_a_flag_each() {
    let port = servers().await;
    let at = |host: &str| format!("http://{host}:{port}");
    let (public, private, metadata) = (at("public.test"), at("in.test"), at("metadata.test"));
    let trust = WebTrust::default();
    for refused in [
        format!("{metadata}/a"),
        format!("{}/a", at("127.0.0.3")),
        format!("{private}/to/{metadata}/a"),
    ] {
        let why = got(trust, &refused).await.unwrap_err();
        assert!(
            why.contains("leads to 127.0.0.3, a link-local address")
                && why.contains("--link-local-addresses"),
            "{why}"
        );
    }
    let asked_for = WebTrust {
        link_local: true,
        ..trust
    };
    assert_eq!(got(asked_for, &format!("{metadata}/a")).await, Ok(()));
    let inside = format!("{private}/to/{metadata}/a");
    assert_eq!(got(asked_for, &inside).await, Ok(()));
    let outside = format!("{public}/to/{metadata}/a");
    assert!(got(asked_for, &outside).await.is_err());
    let distrusted = WebTrust {
        public_only: true,
        ..trust
    };
    assert_eq!(got(distrusted, &format!("{public}/a")).await, Ok(()));
    for refused in [private, metadata, at("127.0.0.1")] {
        let why = got(distrusted, &refused).await.unwrap_err();
        assert!(
            why.contains("which --public-addresses-only refuses"),
            "{why}"
        );
    }
}

#[tokio::test]
async fn redirects_end() {
    let to_itself = "HTTP/1.1 302 Found\r\nlocation: /a.png\r\n\
                     content-length: 0\r\nconnection: close\r\n\r\n";
    let got = read_from(&[to_itself; 12], SHORT).await.unwrap_err();
    assert!(
        got.message.contains("redirects more than 10 times"),
        "{}",
        got.message
    );
}
