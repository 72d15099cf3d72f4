//! TLS and mutual TLS, from files that may be replaced while the worker runs.

mod names;
mod validity;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig, crypto};

use self::validity::CertificateValidity;
use super::reload::{Follower, Latest, open};
use crate::files::FlagFile;
use crate::serve::metrics::ReloadedFile;
use crate::serve::metrics::access::AccessMetrics;

pub(super) use self::names::{ClientNames, SUBJECT_LEN_MAX};
pub(super) use self::validity::NotValid;

/// ALPN protocols, the preferred first: gRPC's, and the one of gRPC-Web, or of
/// clients that are only told what the port serves.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// TLS settings of new connections.
#[derive(Debug)]
pub(super) struct Tls {
    pub(super) config: Arc<ServerConfig>,
    /// Validity of the certificate; none if it could not be read.
    validity: Option<CertificateValidity>,
}

impl Tls {
    /// Reads a certificate, its key, and for mutual TLS the certificates of the
    /// authorities that sign client certificates.
    pub(super) fn open(
        certificate: FlagFile,
        key: FlagFile,
        client_ca: Option<FlagFile>,
    ) -> anyhow::Result<(Latest<Self>, Follower<Self>)> {
        let sources: Vec<FlagFile> = [certificate.clone(), key.clone()]
            .into_iter()
            .chain(client_ca.clone())
            .collect();
        open(ReloadedFile::Certificate, sources, move |contents| {
            let chain = certificates(&certificate, &contents[0])?;
            let private = PrivateKeyDer::from_pem_slice(&contents[1])
                .ok()
                .with_context(|| format!("{key} holds no private key in PEM"))?;
            let clients = match &client_ca {
                Some(source) => Some((source, roots(source, &contents[2])?)),
                None => None,
            };
            // Only the worker's own certificate counts: some chains end in an
            // authority that has ended, for old clients.
            let validity = chain.first().and_then(CertificateValidity::of);
            if let Some(validity) = validity {
                validity
                    .check(SystemTime::now())
                    .with_context(|| format!("{certificate} cannot be used"))?;
            }
            let provider = Arc::new(crypto::ring::default_provider());
            let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()?;
            let builder = match clients {
                Some((source, roots)) => builder.with_client_cert_verifier(
                    WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                        .build()
                        .with_context(|| format!("{source} cannot be used"))?,
                ),
                None => builder.with_no_client_auth(),
            };
            let mut config =
                builder
                    .with_single_cert(chain, private)
                    .map_err(|error| match error {
                        rustls::Error::InconsistentKeys(_) => {
                            anyhow::anyhow!("{key} is not the key of {certificate}")
                        }
                        error => {
                            anyhow::anyhow!("{certificate} with {key} cannot be used: {error}")
                        }
                    })?;
            config.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
            Ok(Self {
                config: Arc::new(config),
                validity,
            })
        })
    }

    /// Reports the expiry of the certificate in the log and in a metric.
    pub(super) fn report(&self, metrics: &AccessMetrics) {
        let Some(CertificateValidity { end, .. }) = self.validity else {
            tracing::warn!("cannot read the expiry of the TLS certificate");
            return;
        };
        let since_1970 = end.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        metrics.certificate_expiry(since_1970.as_secs_f64());
        let until = humantime::format_rfc3339_seconds(end);
        tracing::info!(%until, "the TLS certificate is in force");
    }
}

fn certificates(source: &FlagFile, content: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let chain = CertificateDer::pem_slice_iter(content)
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("{source} is not valid PEM"))?;
    anyhow::ensure!(!chain.is_empty(), "{source} holds no certificate in PEM");
    Ok(chain)
}

fn roots(source: &FlagFile, content: &[u8]) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(source, content)? {
        roots
            .add(certificate)
            .with_context(|| format!("{source} holds an invalid certificate"))?;
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Files {
        dir: tempfile::TempDir,
    }

    impl Files {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            let files = Self { dir };
            for name in ["a", "b"] {
                let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]);
                let made = made.expect("a certificate");
                files.write(&format!("{name}.crt"), &made.cert.pem());
                files.write(&format!("{name}.key"), &made.signing_key.serialize_pem());
            }
            for (name, begin, end) in [("ended", 2001, 2002), ("early", 2100, 2101)] {
                let names = vec!["localhost".to_owned()];
                let mut params = rcgen::CertificateParams::new(names).expect("names");
                params.not_before = rcgen::date_time_ymd(begin, 1, 1);
                params.not_after = rcgen::date_time_ymd(end, 1, 1);
                let key = rcgen::KeyPair::generate().expect("a key");
                let certificate = params.self_signed(&key).expect("a certificate");
                files.write(&format!("{name}.crt"), &certificate.pem());
                files.write(&format!("{name}.key"), &key.serialize_pem());
            }
            files.write("text", "no PEM");
            files.write(
                "broken",
                "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
            );
            files
        }

        fn write(&self, name: &str, content: &str) {
            std::fs::write(self.dir.path().join(name), content).expect("written");
        }

        fn source(&self, flag: &'static str, name: &str) -> FlagFile {
            FlagFile::new(flag, &self.dir.path().join(name))
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_one_sentence() {
        let files = Files::new();
        let check = |cert: &str, key: &str, ca: Option<&str>, expected: &str| {
            let opened = Tls::open(
                files.source("--tls-cert", cert),
                files.source("--tls-key", key),
                ca.map(|ca| files.source("--tls-client-ca", ca)),
            );
            let got = match opened {
                Ok(_) => "fine".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            let got = got.replace(&format!("{}/", files.dir.path().display()), "");
            assert!(got.starts_with(expected), "{got}");
        };
        check("a.crt", "a.key", None, "fine");
        check("a.crt", "a.key", Some("b.crt"), "fine");
        check(
            "ended.crt",
            "ended.key",
            None,
            "--tls-cert ended.crt cannot be used: the certificate ended at 2002-01-01T00:00:00Z",
        );
        check(
            "early.crt",
            "early.key",
            None,
            "--tls-cert early.crt cannot be used: the certificate begins at 2100-01-01T00:00:00Z",
        );
        check("none", "a.key", None, "--tls-cert none cannot be read: ");
        check(
            "text",
            "a.key",
            None,
            "--tls-cert text holds no certificate in PEM",
        );
        check(
            "broken",
            "a.key",
            None,
            "--tls-cert broken is not valid PEM",
        );
        check(
            "a.crt",
            "a.crt",
            None,
            "--tls-key a.crt holds no private key in PEM",
        );
        check(
            "a.crt",
            "b.key",
            None,
            "--tls-key b.key is not the key of --tls-cert a.crt",
        );
        check(
            "a.crt",
            "a.key",
            Some("text"),
            "--tls-client-ca text holds no certificate in PEM",
        );
    }
}
