//! Who may connect, and how much of the worker a client may hold.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;

use super::ConfigError;
use super::bounds::{DAY, SECOND, bounded_size, bounded_time};

/// Any page.
pub(crate) const ANY_ORIGIN: &str = "*";

/// Who is let in.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Access")]
pub struct AccessConfig {
    /// Certificate chain in PEM; with it gRPC is served over TLS only. The
    /// files of this section are read again when their contents change; new
    /// ones that cannot be used are logged and leave the old ones in force.
    /// Open connections live on
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

    /// Certificates in PEM of those who sign clients' certificates; with it
    /// every client must have one (mutual TLS)
    #[arg(
        long,
        env = "IMAGEGPT_TLS_CLIENT_CA",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_client_ca: Option<PathBuf>,

    /// Bearer tokens that calls may bring (metadata `authorization: Bearer
    /// TOKEN`), one a line, of 16 characters or more; lines with # are
    /// comments. Without one of them a call is UNAUTHENTICATED; only
    /// grpc.health.v1 stays open, for probes
    #[arg(long, env = "IMAGEGPT_AUTH_TOKENS_FILE", value_name = "FILE")]
    pub auth_tokens_file: Option<PathBuf>,

    /// Serve on an address that is not loopback with neither TLS nor tokens,
    /// where the network itself keeps strangers out
    #[arg(
        long,
        env = "IMAGEGPT_INSECURE",
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub insecure: bool,

    /// Serve gRPC-Web too, and HTTP/1.1 for it, to browsers and gateways that
    /// cannot speak gRPC's HTTP/2. A connection that speaks HTTP/1.1 has one
    /// call at a time, and is closed when it has none for 30 s
    #[arg(
        long,
        env = "IMAGEGPT_GRPC_WEB",
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub grpc_web: bool,

    /// Pages that may call over gRPC-Web from a browser, by their origin
    /// (`https://app.example`), as often as there are origins; * is any page.
    /// Whoever may call is still the business of tokens and certificates
    #[arg(
        long = "cors-origin",
        env = "IMAGEGPT_CORS_ORIGINS",
        value_name = "ORIGIN",
        value_delimiter = ','
    )]
    pub cors_origins: Vec<String>,
}

/// What clients' connections may hold.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connections")]
pub struct ConnectionsConfig {
    /// Open gRPC connections. For one more, one that has no call in progress is
    /// told to go away, the least recently used first, and is cut after a
    /// second; where all have calls, or had one within a second, the new one is
    /// closed at once, so that its client goes elsewhere instead of waiting. A
    /// client needs one, and each may hold 4 MiB that no call has taken yet,
    /// and 256 KiB of answers. Lowered to what the limit on open files allows (ulimit -n)
    #[arg(
        long,
        env = "IMAGEGPT_CONNECTIONS_MAX",
        default_value_t = 1024,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub connections_max: u32,

    /// Open gRPC connections from one address, so that one host cannot take all
    /// of --connections-max; one more is closed at once. An IPv6 address counts
    /// by its first 64 bits, since every host of a subscriber can have 2^64
    /// addresses of one such network. 0 is no limit, which is the default
    /// because all clients of a pool often come from the one address of a proxy
    /// or balancer; where clients come by themselves, give a few times what one
    /// of their hosts needs
    #[arg(
        long,
        env = "IMAGEGPT_CONNECTIONS_PER_ADDRESS_MAX",
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(0..=1_000_000)
    )]
    pub connections_per_address_max: u32,

    /// Calls on one connection at once; more wait on the client's side
    #[arg(
        long,
        env = "IMAGEGPT_STREAMS_PER_CONNECTION_MAX",
        default_value_t = 1024,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    pub streams_per_connection_max: u32,

    /// Bytes of one call's headers, counted as HTTP/2 does: 32 more for each.
    /// A token and a trace take less than 1 KiB
    #[arg(
        long,
        env = "IMAGEGPT_HEADER_BYTES_MAX",
        default_value = "16KiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 20)
    )]
    pub header_bytes_max: ByteSize,

    /// Age at which a connection is told to go away: calls on it end in their
    /// own time, new ones go to a new connection, and so to workers that were
    /// added since, and through certificates that were replaced. Each
    /// connection's age is up to 10 % shorter or longer, so that clients do
    /// not come back all at once [default: none]
    #[arg(
        long,
        env = "IMAGEGPT_MAX_CONNECTION_AGE",
        value_name = "TIME",
        value_parser = bounded_time(SECOND, DAY)
    )]
    pub max_connection_age: Option<Duration>,

    /// Time for the whole of one request to arrive; then the call is
    /// DEADLINE_EXCEEDED. A request holds its share of --bytes-in-flight-max
    /// while it arrives. The default is enough for the largest request (64
    /// MiB) at 9 Mbit/s. A stream may stay open; each of its messages has as
    /// long, from when there is room for it
    #[arg(
        long,
        env = "IMAGEGPT_REQUEST_TIMEOUT",
        default_value = "60s",
        value_name = "TIME",
        value_parser = bounded_time(SECOND, DAY)
    )]
    pub request_timeout: Duration,

    /// Time for an answer to be taken: for each 64 KiB of it, and in all for each
    /// 2 MiB of it or part of that. Then its stream is reset, and its share of
    /// --bytes-in-flight-max is free. The default is enough at 0.3 Mbit/s, and
    /// at 1 kbit/s for an answer of a few KiB. Raise it for clients that pause
    /// before they read on; lower it where they are near. EmbedStream and
    /// ModelStreamInfer have --stream-idle-timeout besides
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
    /// Whether strangers are kept out by the network alone, and nobody said
    /// that they are.
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
        if !origins.is_empty() && !self.grpc_web {
            return Err(ConfigError(
                "--cors-origin is for browsers, which speak gRPC-Web: add --grpc-web".to_owned(),
            ));
        }
        for origin in origins {
            let problem = match check_origin(origin) {
                Ok(()) if origin == ANY_ORIGIN && origins.len() > 1 => {
                    "any page is allowed already"
                }
                Ok(()) => continue,
                Err(problem) => problem,
            };
            return Err(ConfigError(format!("--cors-origin {origin:?}: {problem}")));
        }
        Ok(())
    }

    /// Whether tokens cross a network that others may read.
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
    /// The limit of one address, if there is one.
    pub(crate) fn per_address_max(&self) -> Option<usize> {
        match self.connections_per_address_max {
            0 => None,
            max => Some(max as usize),
        }
    }
}

/// What is wrong with an origin as a flag has it.
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
        return Err("after the scheme it has a host and perhaps a port, and no path");
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
