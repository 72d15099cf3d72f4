//! Certificates and tokens, which are reloaded when their files change.

use tokio::task::JoinSet;

use super::auth::AcceptedTokens;
use super::reload::{Follower, Latest};
use super::tls::Tls;
use super::web::Web;
use crate::files::FlagFile;
use crate::serve::config::{AccessConfig, LimitsConfig};
use crate::serve::metrics::Metrics;

/// TLS, tokens and gRPC-Web settings, with their files read once.
#[derive(Debug, Default)]
pub(crate) struct Access {
    tls: Option<(Latest<Tls>, Follower<Tls>)>,
    tokens: Option<(Latest<AcceptedTokens>, Follower<AcceptedTokens>)>,
    web: Web,
}

/// Current TLS, tokens and gRPC-Web settings, for the server.
pub(super) struct Guards {
    pub(super) tls: Option<Latest<Tls>>,
    pub(super) tokens: Option<Latest<AcceptedTokens>>,
    pub(super) web: Web,
}

impl Access {
    /// Reads the files that the flags name.
    ///
    /// # Errors
    ///
    /// Returns one sentence about the file that cannot be used.
    pub(crate) fn open(config: &AccessConfig, limits: &LimitsConfig) -> anyhow::Result<Self> {
        let tls = match (&config.tls_cert, &config.tls_key) {
            (Some(certificate), Some(key)) => Some(Tls::open(
                FlagFile::new("--tls-cert", certificate),
                FlagFile::new("--tls-key", key),
                config
                    .tls_client_ca
                    .as_ref()
                    .map(|ca| FlagFile::new("--tls-client-ca", ca)),
            )?),
            _ => None,
        };
        let tokens = match &config.auth_tokens_file {
            Some(path) => Some(AcceptedTokens::open(
                FlagFile::new("--auth-tokens-file", path),
                config.tls_client_ca.is_some(),
                limits.images_per_call_max.max(limits.samples_per_call_max),
            )?),
            None => None,
        };
        let web = Web::new(config);
        Ok(Self { tls, tokens, web })
    }

    /// Starts tasks that reload the files when they change, until the returned
    /// tasks are dropped.
    pub(super) fn follow(self, metrics: &Metrics) -> (Guards, JoinSet<()>) {
        let mut followers = JoinSet::new();
        let tls = self.tls.map(|(latest, follower)| {
            latest.get().report(metrics.access());
            let reported = metrics.clone();
            followers.spawn(follower.run(metrics.clone(), move |tls| {
                tls.report(reported.access());
            }));
            latest
        });
        let tokens = self.tokens.map(|(latest, follower)| {
            followers.spawn(follower.run(metrics.clone(), |_| {}));
            latest
        });
        (
            Guards {
                tls,
                tokens,
                web: self.web,
            },
            followers,
        )
    }
}
