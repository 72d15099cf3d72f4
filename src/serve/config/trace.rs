//! Flags with which an operator follows single calls: traces and the access
//! log.

use std::path::PathBuf;

use clap::Args;

use super::ConfigError;
use super::bounds::bounded_number;

/// Flags for traces and the access log.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Traces")]
pub struct TraceConfig {
    /// URL of an OpenTelemetry collector to which spans are sent over OTLP/gRPC,
    /// such as http://collector:4317 [default: no traces].
    ///
    /// A call has a span with the stages as its children, and is a child of the
    /// span in its `traceparent` metadata. Each batch has a span that links to
    /// the calls in it. No call waits for the collector: spans that it does not
    /// take in time are dropped and counted in imagegpt_spans_dropped_total.
    /// OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and
    /// OTEL_EXPORTER_OTLP_HEADERS are followed
    #[arg(
        long,
        env = "IMAGEGPT_OTLP_ENDPOINT",
        value_name = "URL",
        value_parser = endpoint
    )]
    pub otlp_endpoint: Option<String>,

    /// Certificates in PEM of the authorities that sign the certificate of an
    /// https:// collector [default: the authorities of the public web]
    #[arg(
        long,
        env = "IMAGEGPT_OTLP_CA",
        value_name = "FILE",
        requires = "otlp_endpoint"
    )]
    pub otlp_ca: Option<PathBuf>,

    /// Share of the calls without `traceparent` that are traced, from 0 to 1.
    /// A call with `traceparent` is traced if its caller's span is
    #[arg(
        long,
        env = "IMAGEGPT_OTLP_SAMPLE_RATIO",
        default_value_t = 1.0,
        value_name = "RATIO",
        requires = "otlp_endpoint",
        value_parser = bounded_number(0.0, 1.0)
    )]
    pub otlp_sample_ratio: f64,

    /// Log a line per call at level info when its answer has been written: its
    /// code, its caller's address, its images, and the time of each stage in
    /// milliseconds
    #[arg(
        long,
        env = "IMAGEGPT_ACCESS_LOG",
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub access_log: bool,
}

impl TraceConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let endpoint = self.otlp_endpoint.as_deref().unwrap_or_default();
        if self.otlp_ca.is_some() && !endpoint.starts_with("https://") {
            return Err(ConfigError(format!(
                "--otlp-ca is for a collector with TLS, and --otlp-endpoint {endpoint} has none: \
                 begin it with https://, or remove --otlp-ca"
            )));
        }
        Ok(())
    }
}

fn endpoint(text: &str) -> Result<String, String> {
    const FORM: &str = "write a URL such as http://collector:4317";
    if matches!(text, "http://" | "https://") {
        return Err(format!("it has no host; {FORM}"));
    }
    let uri: http::Uri = text
        .parse()
        .map_err(|error| format!("it is no URL ({error}); {FORM}"))?;
    let has_scheme = matches!(uri.scheme_str(), Some("http" | "https"));
    let authority = uri.authority().map_or("", http::uri::Authority::as_str);
    // Of an address of IPv6, the part behind the bracket.
    let port = authority
        .rsplit(']')
        .next()
        .and_then(|rest| rest.split_once(':'));
    let has_bad_port = port.is_some() && uri.port_u16().is_none();
    let is_plain = !authority.contains('@') && !has_bad_port;
    let has_host = uri.host().is_some_and(|host| !host.is_empty());
    if !has_scheme || !is_plain || !has_host {
        return Err(format!("it must be a scheme, a host and a port; {FORM}"));
    }
    match uri.path_and_query().map_or("/", |path| path.as_str()) {
        "" | "/" => Ok(text.to_owned()),
        path => Err(format!(
            "the path {path} is for OTLP over HTTP, and spans are sent over gRPC, which has none; \
             remove it, and give the collector's port for gRPC (4317 unless set otherwise)"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for good in [
            "http://127.0.0.1:4317",
            "https://otel.example",
            "http://[::1]:4317/",
        ] {
            assert_eq!(endpoint(good), Ok(good.to_owned()), "{good}");
        }
        for bad in [
            "",
            "127.0.0.1:4317",
            "collector",
            "grpc://a:4317",
            "http://",
            "http://user:secret@collector:4317",
            "http://collector:99999",
            "http://a b",
        ] {
            let error = endpoint(bad).expect_err(bad);
            assert!(
                error.contains("; write a URL such as http://"),
                "{bad}: {error}"
            );
        }
        for path in ["/v1/traces", "/otlp/", "/?a=b"] {
            let error = endpoint(&format!("http://collector:4317{path}")).expect_err(path);
            assert!(
                error.starts_with(&format!("the path {path} is for")),
                "{error}"
            );
        }
    }
}
