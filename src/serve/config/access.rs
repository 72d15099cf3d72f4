//! Flags for access (TLS, tokens, gRPC-Web) and for the limits of connections.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;

use super::ConfigError;
use super::bounds::{DAY, SECOND, bounded_size, bounded_time};

/// Value of --cors-origin that allows pages of every origin.
pub(crate) const ANY_ORIGIN: &str = "*";

/// Flags for TLS, authentication and gRPC-Web.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Access")]
pub struct AccessConfig {
    /// Certificate chain in PEM; with the flag, gRPC is served over TLS only.
    ///
    /// The files of --tls-cert, --tls-key, --tls-client-ca and
    /// --auth-tokens-file are read again when their contents change. If the new
    /// contents cannot be used, the error is logged and the old contents stay
    /// in force. Open connections stay open
    #[arg(
        long,
        env = "IMAGEGPT_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    pub tls_cert: Option<PathBuf>,

    /// Private key of --tls-cert in PEM (PKCS#8, PKCS#1 or SEC1)
    #[arg(
        long,
        env = "IMAGEGPT_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_key: Option<PathBuf>,

    /// Certificates in PEM of the authorities that sign client certificates;
    /// with the flag, every client must present a certificate (mutual TLS)
    #[arg(
        long,
        env = "IMAGEGPT_TLS_CLIENT_CA",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_client_ca: Option<PathBuf>,

    /// File with the bearer tokens that authenticate calls (metadata
    /// `authorization: Bearer TOKEN`), and with the names and limits of callers:
    /// one token per line, of 16 characters or more; lines that begin with # are
    /// comments. A call without one of the tokens fails with UNAUTHENTICATED;
    /// only grpc.health.v1 needs no token, so that probes work.
    ///
    /// A line is TOKEN, or NAME TOKEN [OPTION...], or with --tls-client-ca NAME
    /// cert=SUBJECT [OPTION...] for a client certificate, which then needs no
    /// token. Options are rate=N/s (or /m, /h; images that the caller may
    /// submit), in-flight=N (images at the same time) and class=bulk or
    /// class=interactive. The name is in log lines and in the label caller of
    /// imagegpt_requests_total, and callers whose work waits get the same
    /// service. docs/access.md has the whole format
    #[arg(long, env = "IMAGEGPT_AUTH_TOKENS_FILE", value_name = "FILE")]
    pub auth_tokens_file: Option<PathBuf>,

    /// Allow a --listen address that is not loopback with neither TLS nor
    /// tokens. Use the flag only where the network itself keeps strangers out
    #[arg(
        long,
        env = "IMAGEGPT_INSECURE",
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub insecure: bool,

    /// Also serve gRPC-Web, over HTTP/1.1 too, to browsers and gateways that
    /// cannot speak gRPC's HTTP/2. A connection that speaks HTTP/1.1 has one
    /// call at a time, and is closed after 30 s without a call
    #[arg(
        long,
        env = "IMAGEGPT_GRPC_WEB",
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub grpc_web: bool,

    /// Serve a page for browsers at / of the gRPC port, which shows pictures as
    /// the model sees them and completes them. The page calls the worker over
    /// gRPC-Web, as with --grpc-web, and asks no other host. The page itself
    /// needs no token, its calls need one as usual
    #[arg(
        long,
        env = "IMAGEGPT_PLAYGROUND",
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub playground: bool,

    /// Origin of web pages (`https://app.example`) that may call over gRPC-Web
    /// from a browser; * allows every origin. Repeat the flag for more origins.
    /// The flag does not authenticate callers: tokens and certificates are
    /// required as usual
    #[arg(
        long = "cors-origin",
        env = "IMAGEGPT_CORS_ORIGINS",
        value_name = "ORIGIN",
        value_delimiter = ','
    )]
    pub cors_origins: Vec<String>,
}

/// Flags that limit connections and the time of transfers.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connections")]
pub struct ConnectionsConfig {
    /// Largest number of open gRPC connections. The worker lowers the number if
    /// the limit on open files (ulimit -n) allows fewer.
    ///
    /// When a new connection arrives at the limit, the least recently used
    /// connection without a call in progress is asked to close (GOAWAY), and is
    /// cut after a second. If every connection has a call in progress, or had
    /// one within the last second, the new connection is closed at once, so
    /// that its client goes to another worker instead of waiting. A client
    /// needs one connection; each connection may hold 4 MiB of requests that no
    /// call has read yet, and 256 KiB of answers
    #[arg(
        long,
        env = "IMAGEGPT_CONNECTIONS_MAX",
        default_value_t = 1024,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub connections_max: u32,

    /// Largest number of open gRPC connections from one IP address, so that one
    /// host cannot use up --connections-max; a connection above the limit is
    /// closed at once. 0 sets no limit.
    ///
    /// An IPv6 address counts by its first 64 bits, since a subscriber's host
    /// can use any of the 2^64 addresses of such a network. The default is 0
    /// because the clients of a pool often share the address of a proxy or load
    /// balancer. Where clients connect directly, set a few times the number of
    /// connections that one client host needs
    #[arg(
        long,
        env = "IMAGEGPT_CONNECTIONS_PER_ADDRESS_MAX",
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(0..=1_000_000)
    )]
    pub connections_per_address_max: u32,

    /// Largest number of calls in progress on one connection; further calls
    /// wait on the client's side
    #[arg(
        long,
        env = "IMAGEGPT_STREAMS_PER_CONNECTION_MAX",
        default_value_t = 1024,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    pub streams_per_connection_max: u32,

    /// Largest size of the headers of one call, counted as in HTTP/2: 32 bytes
    /// are added per header. A token and a trace context take less than 1 KiB
    #[arg(
        long,
        env = "IMAGEGPT_HEADER_BYTES_MAX",
        default_value = "16KiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 20)
    )]
    pub header_bytes_max: ByteSize,

    /// Age at which a client is asked to open a new connection (GOAWAY), so
    /// that its calls reach workers that were added and use certificates that
    /// were replaced in the meantime [default: no limit].
    ///
    /// Calls in progress finish on the old connection. The age of each
    /// connection is up to 10 % shorter or longer (jitter), so that not all
    /// clients reconnect at the same time
    #[arg(
        long,
        env = "IMAGEGPT_MAX_CONNECTION_AGE",
        value_name = "TIME",
        value_parser = bounded_time(SECOND, DAY)
    )]
    pub max_connection_age: Option<Duration>,

    /// Longest time for one request to arrive completely; after it the call
    /// fails with DEADLINE_EXCEEDED.
    ///
    /// While a request arrives, its bytes count in --bytes-in-flight-max, so
    /// slow clients must not hold them for ever. The default is enough for the
    /// largest request (64 MiB) at 9 Mbit/s. A stream may stay open for longer:
    /// the time applies to each message, from the moment at which the worker
    /// has room for the message
    #[arg(
        long,
        env = "IMAGEGPT_REQUEST_TIMEOUT",
        default_value = "60s",
        value_name = "TIME",
        value_parser = bounded_time(SECOND, DAY)
    )]
    pub request_timeout: Duration,

    /// Longest time for a client to read the next 64 KiB of an answer. A client
    /// that reads too slowly has its call reset, which frees the answer's bytes
    /// in --bytes-in-flight-max.
    ///
    /// A second limit bounds the time for the whole answer: this time once per
    /// started 2 MiB (with 60s, an answer of 5 MiB must be read within 180s).
    /// The default is enough for clients that read at 0.3 Mbit/s, and at 1
    /// kbit/s for answers of a few KiB. Raise the time for clients that pause
    /// while they read; lower it for clients on a fast network. In EmbedStream
    /// and ModelStreamInfer, --stream-idle-timeout is added to this time
    #[arg(
        long,
        env = "IMAGEGPT_ANSWER_TIMEOUT",
        default_value = "60s",
        value_name = "TIME",
        value_parser = bounded_time(SECOND, DAY)
    )]
    pub answer_timeout: Duration,
}

impl AccessConfig {
    /// Refuses an address that is not loopback with neither TLS nor tokens,
    /// unless --insecure is given.
    pub(super) fn validate(&self, listen: SocketAddr) -> Result<(), ConfigError> {
        self.validate_web()?;
        let guarded = self.tls_cert.is_some() || self.auth_tokens_file.is_some();
        if guarded || self.insecure || is_loopback(listen) {
            return Ok(());
        }
        Err(ConfigError(format!(
            "--listen {listen} is not loopback, and anyone who reaches it could use the worker: \
             give --tls-cert and --tls-key (and --tls-client-ca, so that clients need a \
             certificate), or --auth-tokens-file, or --insecure if the network keeps strangers out"
        )))
    }

    fn validate_web(&self) -> Result<(), ConfigError> {
        let origins = &self.cors_origins;
        if !origins.is_empty() && !self.serves_web() {
            return Err(ConfigError(
                "--cors-origin is for browsers, which speak gRPC-Web: add --grpc-web".to_owned(),
            ));
        }
        for origin in origins {
            let problem = match check_origin(origin) {
                Ok(()) if origin == ANY_ORIGIN && origins.len() > 1 => {
                    "* already allows every page; remove the other origins"
                }
                Ok(()) => continue,
                Err(problem) => problem,
            };
            return Err(ConfigError(format!("--cors-origin {origin:?}: {problem}")));
        }
        Ok(())
    }

    /// Returns true if gRPC-Web is served.
    pub(crate) fn serves_web(&self) -> bool {
        self.grpc_web || self.playground
    }

    /// Returns the address of the page of --playground for a person on this
    /// machine; `None` if no page is served.
    pub(crate) fn page_address(&self, listen: SocketAddr) -> Option<String> {
        let scheme = match self.tls_cert {
            Some(_) => "https",
            None => "http",
        };
        self.playground.then(|| format!("{scheme}://{listen}/"))
    }

    /// Returns true if tokens cross a network without TLS, so that others may
    /// read them.
    #[must_use]
    pub fn tokens_in_the_clear(&self, listen: SocketAddr) -> bool {
        self.auth_tokens_file.is_some() && self.tls_cert.is_none() && !is_loopback(listen)
    }
}

fn is_loopback(addr: SocketAddr) -> bool {
    // ::ffff:127.0.0.1 is loopback too.
    addr.ip().to_canonical().is_loopback()
}

impl ConnectionsConfig {
    /// Returns the limit on connections of one address; none if there is no
    /// limit.
    pub(crate) fn per_address_max(&self) -> Option<usize> {
        match self.connections_per_address_max {
            0 => None,
            max => Some(max as usize),
        }
    }
}

/// Checks the origin of a --cors-origin flag, and says what is wrong with it.
fn check_origin(origin: &str) -> Result<(), &'static str> {
    if origin == ANY_ORIGIN {
        return Ok(());
    }
    let host = origin
        .strip_prefix("https://")
        .or_else(|| origin.strip_prefix("http://"))
        .ok_or("it must begin with https:// or http://, or be *")?;
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
    if host.is_empty() || !host.bytes().all(is_host) {
        return Err("after the scheme it must have a host, optionally a port, and no path");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        for good in [
            "*",
            "https://a.example",
            "http://localhost:8080",
            "http://[::1]:3",
        ] {
            assert_eq!(check_origin(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "a.example",
            "https://",
            "https://a.example/",
            "null",
            "http://a b",
        ] {
            assert!(check_origin(bad).is_err(), "{bad}");
        }
    }
}
