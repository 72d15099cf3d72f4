//! Clients of object stores and web servers, with the credentials that each
//! cloud's own tools would use.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::{ClientOptions, CredentialProvider, ObjectStore, RetryConfig};

use super::wire::StoreWire;
use crate::files;

/// Longest time for which a request to a store is retried. After a longer time
/// the credentials may expire between the retries; the same command then
/// resumes the job.
pub(super) const RETRY_TIMEOUT: Duration = Duration::from_mins(4);
const RETRIES_MAX: usize = 60;
/// Longest time for a request. A block of 4 MiB takes about a second, and a
/// request to a bucket that stalls is repeated.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for the first credentials of a machine's own metadata service,
/// which answers within milliseconds where there is one, and within seconds in
/// a pod that has just started.
const METADATA_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest file of credentials; they have a few lines per profile.
const PROFILES_BYTES_MAX: u64 = 1 << 20;

/// Error of a bucket for which no credentials are known.
#[derive(Debug, thiserror::Error)]
#[error("no credentials: {0}")]
pub(super) struct NoCredentials(String);

/// Makes the client of a store. Credentials and endpoints come from the
/// environment, under the names that each cloud's own tools use (AWS_…,
/// GOOGLE_…, AZURE_…), and for AWS from its files of profiles.
pub(super) fn connect(
    scheme: &str,
    root: &str,
    query: Option<String>,
) -> anyhow::Result<Arc<dyn ObjectStore>> {
    // Whichever of the two TLS libraries comes first installs the provider.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let retry = RetryConfig {
        max_retries: RETRIES_MAX,
        retry_timeout: RETRY_TIMEOUT,
        ..RetryConfig::default()
    };
    // The builders take client options one by one from the environment; setting
    // all options at the same time would undo that.
    let set = |key, value: Duration| (key, format!("{}s", value.as_secs()));
    let times = [
        set(object_store::ClientConfigKey::Timeout, REQUEST_TIMEOUT),
        set(
            object_store::ClientConfigKey::ConnectTimeout,
            CONNECT_TIMEOUT,
        ),
    ];
    let wire = StoreWire {
        web: scheme.starts_with("http"),
        query,
    };
    Ok(match scheme {
        "s3" | "s3a" => {
            let mut builder = s3_builder(root)?.with_retry(retry);
            for (key, value) in times {
                builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
            }
            s3(builder.with_http_connector(wire)).with_context(|| root.to_owned())?
        }
        "gs" => {
            let mut builder = GoogleCloudStorageBuilder::from_env()
                .with_url(root)
                .with_retry(retry);
            for (key, value) in times {
                builder =
                    builder.with_config(object_store::gcp::GoogleConfigKey::Client(key), value);
            }
            let store = builder.with_http_connector(wire).build();
            Arc::new(store.with_context(|| root.to_owned())?)
        }
        "az" | "abfs" | "abfss" | "adl" => {
            let mut builder = MicrosoftAzureBuilder::from_env()
                .with_url(root)
                .with_retry(retry);
            for (key, value) in times {
                builder =
                    builder.with_config(object_store::azure::AzureConfigKey::Client(key), value);
            }
            let store = builder.with_http_connector(wire).build();
            Arc::new(store.with_context(|| root.to_owned())?)
        }
        "http" | "https" => Arc::new(
            HttpBuilder::new()
                .with_url(root)
                .with_retry(retry)
                .with_client_options(
                    ClientOptions::new()
                        .with_timeout(REQUEST_TIMEOUT)
                        .with_connect_timeout(CONNECT_TIMEOUT)
                        .with_allow_http(scheme == "http"),
                )
                .with_http_connector(wire)
                .build()
                .with_context(|| root.to_owned())?,
        ),
        "hf" => anyhow::bail!(
            "{root}: hf:// can only be an input of the job; in a list or a table write the file's \
             https:// URL, and give an --output elsewhere"
        ),
        _ => anyhow::bail!(
            "{root}: {scheme}:// is not supported; give a path, or s3://, gs://, az://, http://, \
             https:// or hf://datasets/"
        ),
    })
}

/// Returns the value of an environment variable; one that is empty counts as
/// unset.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Returns true if a variable of the environment is set to yes.
fn is_on(name: &str) -> bool {
    variable(name).is_some_and(|value| {
        ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str())
    })
}

/// Makes a builder of S3 clients from the environment and, where it has no
/// keys, from the profile.
fn s3_builder(root: &str) -> anyhow::Result<AmazonS3Builder> {
    let mut builder = AmazonS3Builder::new().with_url(root);
    for (name, value) in std::env::vars_os() {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else {
            continue;
        };
        if name.starts_with("AWS_")
            && !value.is_empty()
            && let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>()
        {
            builder = builder.with_config(key, value);
        }
    }
    let is_given = |key: AmazonS3ConfigKey| builder.get_config_value(&key).is_some();
    let has_keys = is_given(AmazonS3ConfigKey::AccessKeyId)
        || is_given(AmazonS3ConfigKey::SecretAccessKey)
        || is_on("AWS_SKIP_SIGNATURE");
    let has_region =
        is_given(AmazonS3ConfigKey::Region) || is_given(AmazonS3ConfigKey::DefaultRegion);
    let has_endpoint = is_given(AmazonS3ConfigKey::Endpoint);
    let profile = AwsProfile::read(has_keys)?;
    if let Some(AwsKeys { id, secret, token }) = profile.keys {
        builder = builder
            .with_access_key_id(id)
            .with_secret_access_key(secret);
        if let Some(token) = token {
            builder = builder.with_token(token);
        }
    }
    if let Some(region) = profile.region.filter(|_| !has_region) {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = profile.endpoint.filter(|_| !has_endpoint) {
        builder = builder.with_endpoint(endpoint);
    }
    Ok(builder)
}

/// Makes the S3 client. If only the metadata service of the machine could have
/// credentials, the first ones have a time limit.
fn s3(builder: AmazonS3Builder) -> anyhow::Result<Arc<dyn ObjectStore>> {
    let has = |key: AmazonS3ConfigKey| builder.get_config_value(&key).is_some();
    let is_known = has(AmazonS3ConfigKey::AccessKeyId)
        || has(AmazonS3ConfigKey::SecretAccessKey)
        || is_on("AWS_SKIP_SIGNATURE")
        || [
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        ]
        .into_iter()
        .any(|name| variable(name).is_some());
    let store = builder.clone().build()?;
    if is_known {
        return Ok(Arc::new(store));
    }
    let first = FirstCredentials {
        inner: Arc::clone(store.credentials()),
        is_off: is_on("AWS_EC2_METADATA_DISABLED"),
        known: AtomicBool::new(false),
    };
    Ok(Arc::new(builder.with_credentials(Arc::new(first)).build()?))
}

/// Credentials of the machine's metadata service, whose absence shows within
/// [`METADATA_TIMEOUT`].
#[derive(Debug)]
struct FirstCredentials<T> {
    inner: Arc<dyn CredentialProvider<Credential = T>>,
    /// True if the metadata service must not be asked.
    is_off: bool,
    known: AtomicBool,
}

impl<T: std::fmt::Debug + Send + Sync> CredentialProvider for FirstCredentials<T> {
    type Credential = T;

    fn get_credential<'life0, 'future>(
        &'life0 self,
    ) -> BoxFuture<'future, object_store::Result<Arc<T>>>
    where
        'life0: 'future,
        Self: 'future,
    {
        async move {
            // Once there were credentials, the next ones are worth a wait.
            if self.known.load(Ordering::Relaxed) {
                return self.inner.get_credential().await;
            }
            let asked = if self.is_off {
                None
            } else {
                let asked = tokio::time::timeout(METADATA_TIMEOUT, self.inner.get_credential());
                asked.await.ok()
            };
            let why = match asked {
                Some(Ok(credentials)) => {
                    self.known.store(true, Ordering::Relaxed);
                    return Ok(credentials);
                }
                Some(Err(error)) => format!("the metadata service has none: {error}"),
                None if self.is_off => "AWS_EC2_METADATA_DISABLED is set".to_owned(),
                None => "there is no metadata service".to_owned(),
            };
            let known = NoCredentials(format!(
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or \
                 AWS_PROFILE for a profile of ~/.aws/credentials, or AWS_SKIP_SIGNATURE=true for a \
                 public bucket ({why})"
            ));
            Err(object_store::Error::Generic {
                store: "S3",
                source: Box::new(known),
            })
        }
        .boxed()
    }
}

/// Facts of a profile of AWS's own tools.
#[derive(Debug, Default, PartialEq, Eq)]
struct AwsProfile {
    keys: Option<AwsKeys>,
    region: Option<String>,
    endpoint: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct AwsKeys {
    id: String,
    secret: String,
    token: Option<String>,
}

impl AwsProfile {
    /// Reads the profile that `AWS_PROFILE` names, or the default one. Keys are
    /// not read if the environment has them.
    fn read(has_keys: bool) -> anyhow::Result<Self> {
        let named = variable("AWS_PROFILE").or_else(|| variable("AWS_DEFAULT_PROFILE"));
        let home = variable("HOME").map(PathBuf::from);
        let file = |name: &str, usual: &str| {
            let given = variable(name).map(PathBuf::from);
            given.or_else(|| Some(home.as_ref()?.join(usual)))
        };
        let credentials = file("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials");
        let config = file("AWS_CONFIG_FILE", ".aws/config");
        let mut profile = Self::of(
            named.as_deref(),
            &text(credentials.as_deref())?,
            &text(config.as_deref())?,
        )?;
        if has_keys {
            profile.keys = None;
        } else if let Some(name) = named.filter(|_| profile.keys.is_none()) {
            anyhow::bail!(
                "AWS_PROFILE {name}: the profile has no aws_access_key_id and \
                 aws_secret_access_key in {}; of a profile with sso, a role or a process, export \
                 the keys first (aws configure export-credentials --profile {name} --format env)",
                credentials.unwrap_or_default().display()
            );
        }
        Ok(profile)
    }

    /// Finds a profile in the contents of both files.
    fn of(name: Option<&str>, credentials: &str, config: &str) -> anyhow::Result<Self> {
        let name = name.unwrap_or("default");
        let (credentials, config) = (ini(credentials)?, ini(config)?);
        let of_config = format!("profile {name}");
        let value = |key: &str| {
            credentials
                .get(name, key)
                .or_else(|| config.get(&of_config, key))
                .or_else(|| config.get(name, key).filter(|_| name == "default"))
                .filter(|value| !value.is_empty())
        };
        let keys = value("aws_access_key_id").zip(value("aws_secret_access_key"));
        Ok(Self {
            keys: keys.map(|(id, secret)| AwsKeys {
                id,
                secret,
                token: value("aws_session_token"),
            }),
            region: value("region"),
            endpoint: value("endpoint_url"),
        })
    }
}

/// Returns the content of a file of profiles; nothing if there is no such file.
fn text(path: Option<&Path>) -> anyhow::Result<String> {
    let Some(path) = path else {
        return Ok(String::new());
    };
    let found = files::read(path, PROFILES_BYTES_MAX);
    match found.with_context(|| path.display().to_string())? {
        Ok(Some(bytes)) => {
            String::from_utf8(bytes).map_err(|_| anyhow::anyhow!("{} is not UTF-8", path.display()))
        }
        Ok(None) => anyhow::bail!(
            "{} has over {PROFILES_BYTES_MAX} bytes, the limit for a file of profiles",
            path.display()
        ),
        Err(files::Trouble::Missing | files::Trouble::LinkNowhere | files::Trouble::Denied) => {
            Ok(String::new())
        }
        Err(trouble) => anyhow::bail!("{}: {trouble}", path.display()),
    }
}

fn ini(text: &str) -> anyhow::Result<configparser::ini::Ini> {
    let mut ini = configparser::ini::Ini::new_cs();
    let mut defaults = ini.defaults();
    // A key may contain any other letter.
    defaults.delimiters = vec!['='];
    ini.load_defaults(defaults);
    ini.set_comment_symbols(&['#', ';']);
    ini.set_inline_comment_symbols(Some(&[]));
    ini.read(text.to_owned())
        .map_err(|error| anyhow::anyhow!("the file of AWS profiles cannot be read: {error}"))?;
    Ok(ini)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_has_its_keys_and_its_region() {
        let credentials = "[default]\naws_access_key_id = D\naws_secret_access_key=d/+=x\n\n\
                           # other\n[Other]\naws_access_key_id=O\naws_secret_access_key = o;#o\n\
                           aws_session_token = t:t==\n";
        let config = "[default]\nregion = eu-west-1\ns3 =\n  addressing_style = path\n\
                      [profile Other]\nregion=us-west-2\nendpoint_url = http://h:1\n\
                      [profile role]\nrole_arn = r\n";
        let of = |name| AwsProfile::of(name, credentials, config).unwrap();
        let keys = |id: &str, secret: &str, token: Option<&str>| {
            Some(AwsKeys {
                id: id.to_owned(),
                secret: secret.to_owned(),
                token: token.map(str::to_owned),
            })
        };
        let default = of(None);
        assert_eq!(default.keys, keys("D", "d/+=x", None));
        assert_eq!(default.region.as_deref(), Some("eu-west-1"));
        let other = of(Some("Other"));
        assert_eq!(other.keys, keys("O", "o;#o", Some("t:t==")));
        assert_eq!(other.region.as_deref(), Some("us-west-2"));
        assert_eq!(other.endpoint.as_deref(), Some("http://h:1"));
        assert_eq!(of(Some("role")).keys, None);
        assert_eq!(of(Some("none")), AwsProfile::default());
    }
}
