//! A worker within this process, from its flags to its readiness: for `imagegpt
//! serve`, and for commands that are given a model instead of an endpoint. They
//! reach theirs over gRPC too, so that both are one pipeline.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser};

use crate::commands::compile::Bars;
use crate::compile::{CompileOptions, CompileProgress, ModelSource, cache};
use crate::engine::onnx;
use crate::model::Model;
use crate::model::head::LinearHead;
use crate::model::precision::{Provider, ProviderChoice};
use crate::runtime::Runtime;
use crate::serve::config::{ModelConfig, ServeConfig};
use crate::serve::engines::engines;
use crate::serve::rpc;
use crate::serve::worker::Worker;

/// Time for the last answers of a worker of one's own: nobody waits for them.
const OWN_GRACE: Duration = Duration::from_secs(1);

/// Which model a command serves to itself.
#[derive(Debug, Clone, Args)]
pub struct OwnWorkerFlags {
    // IMAGEGPT_MODEL is not read: in a worker's container, which may be a job's own
    // too, it names what that worker serves, and these commands are there to ask it.
    /// Serve this model within this process instead; what `imagegpt serve
    /// --model` takes
    #[arg(long, value_name = "SOURCE")]
    pub model: Option<String>,

    #[command(flatten)]
    pub more: MoreServeFlags,
}

/// How a command serves the model that its `--model` names.
#[derive(Debug, Clone, Args)]
pub struct MoreServeFlags {
    /// More flags of `imagegpt serve` for --model, split at spaces
    #[arg(
        long,
        value_name = "FLAGS",
        requires = "model",
        allow_hyphen_values = true
    )]
    pub serve: Option<String>,
}

impl OwnWorkerFlags {
    /// The flags of the worker, where one is asked for. `defaults` hold unless
    /// `--serve` says otherwise.
    ///
    /// # Errors
    ///
    /// When `--serve` has no flags of `imagegpt serve`.
    pub fn config(&self, defaults: &[&str]) -> anyhow::Result<Option<ServeConfig>> {
        let more = self.more.serve.as_deref();
        let config = |model: &String| own_config(model, defaults, more);
        self.model.as_ref().map(config).transpose()
    }
}

/// A worker within this process, for one command.
pub struct OwnWorker(Worker);

impl OwnWorker {
    /// A worker that is ready, of a model that is compiled first if it has to be;
    /// `None` if `stop` comes before that.
    ///
    /// # Errors
    ///
    /// When the model or the addresses cannot be used.
    pub async fn start(
        config: &ServeConfig,
        stop: impl Future<Output = ()>,
    ) -> anyhow::Result<Option<Self>> {
        let ready = async {
            let mut worker = start(config).await?;
            is_ready(&mut worker).await?;
            anyhow::Ok(Self(worker))
        };
        tokio::select! {
            worker = ready => worker.map(Some),
            () = stop => Ok(None),
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.0.grpc_addr)
    }

    /// Ends it; its only client is done with it.
    pub async fn end(self) {
        self.0.shutdown(OWN_GRACE).await;
    }
}

/// The flags of a worker for this process alone. `defaults` hold unless `more`,
/// flags of `imagegpt serve` that are split at spaces, says otherwise.
///
/// # Errors
///
/// When `more` is not such flags.
pub fn own_config(
    model: &str,
    defaults: &[&str],
    more: Option<&str>,
) -> anyhow::Result<ServeConfig> {
    #[derive(Parser)]
    #[command(args_override_self = true)]
    struct Serve {
        #[command(flatten)]
        config: ServeConfig,
    }
    let own = ["serve", "--model", model];
    // Any free port, so that it is in nobody's way; and nobody else's business.
    let ports = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"];
    let more = more.unwrap_or_default().split_whitespace();
    let all = own
        .into_iter()
        .chain(ports)
        .chain(defaults.iter().copied())
        .chain(more);
    let parsed = Serve::try_parse_from(all).map_err(|error| {
        // Without the words that point to a help that is another command's.
        let text = error.to_string();
        let text = text.split("\n\n").next().unwrap_or_default();
        anyhow::anyhow!("--serve: {}", text.trim_start_matches("error: "))
    })?;
    let mut config = parsed.config;
    // What the environment says of access is for a worker that others reach.
    let access = &mut config.access;
    (access.tls_cert, access.tls_key, access.tls_client_ca) = (None, None, None);
    access.auth_tokens_file = None;
    config.validate().context("--serve")?;
    Ok(config)
}

/// Resolves when the worker is ready.
///
/// # Errors
///
/// When its model cannot be served.
pub async fn is_ready(worker: &mut Worker) -> anyhow::Result<()> {
    let ready = worker.ready().await;
    ready.map(drop).context("the model cannot be served")
}

/// A worker that listens, and will be ready once its engine has loaded the model.
///
/// # Errors
///
/// When the model or the addresses cannot be used.
pub async fn start(config: &ServeConfig) -> anyhow::Result<Worker> {
    // What is wrong with them is told before a model is compiled.
    rpc::Access::open(&config.access)?;
    if config.access.tokens_in_the_clear(config.network.listen) {
        tracing::warn!(
            "bearer tokens will cross the network unencrypted; give --tls-cert and --tls-key, or \
             let a proxy on this machine do TLS"
        );
    }
    let owned = config.clone();
    let load = move || -> anyhow::Result<_> {
        let (model, heads) = open_model(&owned)?;
        let engines = engines(&owned, &model, &heads)?;
        Ok((model, heads, engines))
    };
    let (model, heads, engines) = tokio::task::spawn_blocking(load).await??;
    let worker = Worker::start(config, model, heads, engines).await?;
    tracing::info!(grpc = %worker.grpc_addr, metrics = %worker.metrics_addr, "listening");
    Ok(worker)
}

/// The model that a worker with these flags serves, compiled first if it has to be,
/// with its heads.
///
/// # Errors
///
/// When there is no such model, it cannot be compiled, or a head does not fit it.
pub(crate) fn open_model(config: &ServeConfig) -> anyhow::Result<(Model, Vec<LinearHead>)> {
    let mut bars = Bars::new();
    let folder = locate(config, &mut bars);
    bars.end();
    let folder = folder?;
    tracing::info!(folder = %folder.display(), "reading the model");
    let name = name(&config.model, &folder);
    let model = Model::open(&folder, name.as_deref())?;
    let heads = config.model.heads.iter().map(LinearHead::open);
    let heads = heads.collect::<Result<Vec<_>, _>>()?;
    for head in &heads {
        head.check(&model)?;
    }
    Ok((model, heads))
}

/// What the model is called: as the flag says, or like what was compiled, whose
/// folder in the cache has a name that says nothing to a person. Otherwise the
/// model's own folder names it.
fn name(config: &ModelConfig, folder: &Path) -> Option<String> {
    let given = config.model_name.clone();
    let source = Path::new(&config.model);
    if given.is_some() || source == folder {
        return given;
    }
    let name = source.file_name().map(ToOwned::to_owned).or_else(|| {
        // Such as `.`.
        let folder = source.canonicalize().ok()?;
        folder.file_name().map(ToOwned::to_owned)
    });
    name.map(|name| name.to_string_lossy().into_owned())
}

/// The directory to serve, compiled if it has to be.
///
/// # Errors
///
/// When there is no such model, or it cannot be compiled.
pub fn locate(config: &ServeConfig, progress: &mut dyn CompileProgress) -> anyhow::Result<PathBuf> {
    let library = onnx::find_library(config.model.library.onnxruntime.as_deref());
    let provider = match config.model.devices.provider.execution_provider {
        ProviderChoice::Cuda => Provider::Cuda,
        // A GPU that is there by chance is no reason to compile for it.
        ProviderChoice::Cpu | ProviderChoice::Auto => Provider::Cpu,
    };
    let runtime = || {
        let runtime = Runtime::new(onnx::environment(&library)?, provider)?;
        // Better now than when everything but the last trial is done.
        if provider == Provider::Cuda {
            onnx::probe(&runtime)?;
        }
        Ok(runtime)
    };
    let compile = &config.model.compile;
    let source = ModelSource::parse(&config.model.model, compile.revision.as_deref());
    let options = CompileOptions {
        precision: compile.precision,
        provider,
        tasks: None,
        feature_layer: compile.feature_layer,
    };
    let cache_dir = compile.cache.cache_dir.as_deref();
    cache::locate(&source, cache_dir, &options, runtime, progress)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiled_model_is_called_like_its_source() {
        let called = |flags: &[&str], folder: &str| {
            let config = own_config(flags[0], &flags[1..], None).unwrap();
            name(&config.model, Path::new(folder))
        };
        let cached = "/cache/models/0123456789abcdef";
        let is = |given: Option<String>, wanted: &str| assert_eq!(given.as_deref(), Some(wanted));
        is(called(&["openai/imagegpt-small"], cached), "imagegpt-small");
        is(called(&["models/emoji/"], cached), "emoji");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .canonicalize()
            .unwrap();
        let root = root.file_name().unwrap().to_str().unwrap().to_owned();
        is(called(&["src/.."], cached), &root);
        is(called(&["a/b", "--model-name", "c"], cached), "c");
        assert_eq!(called(&["models/emoji"], "models/emoji"), None);
    }
}
