//! Names under which clients reach the worker, which keep other people's web
//! pages away.
//!
//! Browsers let a page read from the host that the page came from. An attacker's
//! page can come from a name that later resolves to 127.0.0.1 (DNS rebinding);
//! neither the address of the client nor CORS tells its requests from others,
//! but their `Host` does: it is the name that the browser knows.

use std::net::IpAddr;

use http::uri::Authority;
use http::{HeaderValue, Request, Version, header};

/// Answer to a request of HTTP/1.1 whose `Host` is missing, is there twice, or
/// is no host.
pub(crate) const BAD_HOST: &str = "a request over HTTP/1.1 needs one Host header with a name or \
                                   an address, and a port or none: send one\n";

/// Returns the host of a request, with its port if there is one; the empty text
/// if the request names none.
pub(crate) fn host<B>(request: &Request<B>) -> &str {
    match request.uri().authority() {
        Some(authority) => authority.as_str(),
        None => header_text(request.headers().get(header::HOST)),
    }
}

/// Returns a header's value; the empty text if there is none, or none in ASCII.
pub(crate) fn header_text(value: Option<&HeaderValue>) -> &str {
    value.and_then(|value| value.to_str().ok()).unwrap_or("")
}

/// Returns false if a request of HTTP/1.1 or HTTP/1.0 must be refused for its
/// `Host` (RFC 9112, section 3.2): of two, one reader may take the first and
/// another the second. HTTP/2 has its own rules, which the library holds.
pub(crate) fn has_one_host<B>(request: &Request<B>) -> bool {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        _ if request.version() >= Version::HTTP_2 => true,
        // HTTP/1.0 has no Host.
        (None, _) => request.version() < Version::HTTP_11,
        (Some(host), None) => is_host(host.as_bytes()),
        (Some(_), Some(_)) => false,
    }
}

/// Returns true if the value of a `Host` is a host and a port or none. The empty
/// one belongs to a request whose address has no host.
fn is_host(value: &[u8]) -> bool {
    value.is_empty() || (!value.contains(&b'@') && Authority::try_from(value).is_ok())
}

/// Returns true if a host is a name or an address of loopback.
pub(crate) fn is_loopback_name(host: &str) -> bool {
    if let Some(address) = address(host) {
        return address.to_canonical().is_loopback();
    }
    // All names below localhost are loopback's (RFC 6761).
    let name = host.split_once(':').map_or(host, |(name, _)| name);
    let name = name.strip_suffix('.').unwrap_or(name);
    let top = name.rsplit_once('.').map_or(name, |(_, top)| top);
    top.eq_ignore_ascii_case("localhost") && !name.starts_with('[')
}

/// Returns true if nobody can have moved a host to this machine: a name of
/// loopback, or any address, because an address is looked up nowhere.
pub(crate) fn cannot_be_moved(host: &str) -> bool {
    address(host).is_some() || is_loopback_name(host)
}

/// Returns the address that a host is, if the host is no name.
fn address(host: &str) -> Option<IpAddr> {
    let text = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']')?;
            let is_port = after.is_empty() || after.starts_with(':');
            return is_port.then(|| address.parse().ok().map(IpAddr::V6))?;
        }
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    text.parse().ok().map(IpAddr::V4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_loopback() {
        for good in [
            "localhost",
            "LOCALHOST:50051",
            "page.localhost:1",
            "localhost.",
            "127.0.0.1",
            "127.9.9.9:50051",
            "[::1]",
            "[::1]:50051",
            "[::ffff:127.0.0.1]:80",
        ] {
            assert!(is_loopback_name(good), "{good}");
            assert!(cannot_be_moved(good), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "notlocalhost",
            "[::1]evil",
            "[::1]evil.localhost",
            "[::1",
            "[x.localhost",
            "[localhost]",
            "@localhost",
        ] {
            assert!(!is_loopback_name(bad), "{bad}");
            assert!(!cannot_be_moved(bad), "{bad}");
        }
        for elsewhere in ["10.0.0.1", "10.0.0.1:9090", "0.0.0.0", "[2001:db8::1]:9090"] {
            assert!(!is_loopback_name(elsewhere), "{elsewhere}");
            assert!(cannot_be_moved(elsewhere), "{elsewhere}");
        }
    }

    #[test]
    fn requests_have_one_host() {
        let check = |version: Version, hosts: &[&str], expected: bool| {
            let mut request = Request::builder().version(version).uri("/");
            for &host in hosts {
                request = request.header(header::HOST, host);
            }
            let request = request.body(()).expect("a request");
            assert_eq!(has_one_host(&request), expected, "{version:?} {hosts:?}");
        };
        let name = "worker.example";
        for (hosts, expected) in [
            (&[name][..], true),
            (&["localhost:50051"], true),
            (&["[::1]:50051"], true),
            (&["worker_1.svc"], true),
            (&[""], true),
            (&[name, name], false),
            (&["localhost", "evil.example"], false),
            (&["", name], false),
            (&["localhost evil.example"], false),
            (&["user@localhost"], false),
            (&["localhost/evil"], false),
        ] {
            check(Version::HTTP_11, hosts, expected);
            check(Version::HTTP_10, hosts, expected);
            check(Version::HTTP_2, hosts, true);
        }
        check(Version::HTTP_11, &[], false);
        check(Version::HTTP_10, &[], true);
        check(Version::HTTP_2, &[], true);
    }
}
