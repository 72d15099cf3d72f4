//! Worker within this process, from its flags to its readiness: for `imagegpt
//! serve`, and for commands that get a model instead of an endpoint. Such
//! commands call their own worker over gRPC too, so that both cases use the
//! same pipeline.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser};

use crate::commands::compile::Bars;
use crate::compile::{CompileOptions, CompileProgress, ModelSource, cache};
use crate::engine::onnx;
use crate::model::head::LinearHead;
use crate::model::precision::{Provider, ProviderChoice};
use crate::model::{Model, ModelNeed, snapshot_repository};
use crate::runtime::Runtime;
use crate::serve::config::{ModelConfig, ServeConfig};
use crate::serve::engines::engines;
use crate::serve::heads::StartHeads;
use crate::serve::rpc;
use crate::serve::worker::Worker;

/// Longest time for the last answers of a command's own worker, for which
/// nobody waits.
const OWN_GRACE: Duration = Duration::from_secs(1);

/// Flags of the model that a command serves to itself.
#[derive(Debug, Clone, Args)]
pub struct OwnWorkerFlags {
    // IMAGEGPT_MODEL is not read here. In a worker's container, which may also
    // be the job's, the variable names the model of the worker, and these
    // commands are there to call that worker.
    /// Serve this model within this process instead of calling a worker; takes
    /// the same values as `imagegpt serve --model`
    #[arg(long, value_name = "SOURCE")]
    pub model: Option<String>,

    #[command(flatten)]
    pub more: MoreServeFlags,
}

/// Flags for the way in which a command serves the model of its `--model`.
#[derive(Debug, Clone, Args)]
pub struct MoreServeFlags {
    /// More flags of `imagegpt serve` for the model of --model, separated by
    /// spaces
    #[arg(
        long,
        value_name = "FLAGS",
        requires = "model",
        allow_hyphen_values = true
    )]
    pub serve: Option<String>,
}

impl OwnWorkerFlags {
    /// Returns the flags of the worker, if `--model` asks for one. `defaults`
    /// apply unless `--serve` overrides them.
    ///
    /// # Errors
    ///
    /// When `--serve` contains something other than flags of `imagegpt serve`.
    pub fn config(&self, defaults: &[&str]) -> anyhow::Result<Option<ServeConfig>> {
        let more = self.more.serve.as_deref();
        let config = |model: &String| own_config(model, defaults, more);
        self.model.as_ref().map(config).transpose()
    }
}

/// Worker within this process, for one command.
pub struct OwnWorker(Worker);

impl OwnWorker {
    /// Starts a worker and waits until it is ready; the model is compiled first
    /// if necessary. Returns `None` if `stop` resolves before that.
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

    /// Returns the URL at which the worker listens.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.0.grpc_addr)
    }

    /// Ends the worker, whose only client is done.
    pub async fn end(self) {
        self.0.shutdown(OWN_GRACE).await;
    }
}

/// Parses the flags of a worker for this process alone. `defaults` apply unless
/// `more`, which has flags of `imagegpt serve` separated by spaces, overrides
/// them.
///
/// # Errors
///
/// When `more` contains something other than flags of `imagegpt serve`.
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
    // Any free port, to avoid conflicts, on an address that other machines
    // cannot reach.
    let ports = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"];
    let more = more.unwrap_or_default().split_whitespace();
    let all = own
        .into_iter()
        .chain(ports)
        .chain(defaults.iter().copied())
        .chain(more);
    let parsed = Serve::try_parse_from(all).map_err(|error| {
        // Only the first paragraph, since the rest points to the help of
        // another command.
        let text = error.to_string();
        let text = text.split("\n\n").next().unwrap_or_default();
        anyhow::anyhow!("--serve: {}", text.trim_start_matches("error: "))
    })?;
    let mut config = parsed.config;
    // Access settings of the environment are meant for a worker that others
    // reach.
    let access = &mut config.access;
    (access.tls_cert, access.tls_key, access.tls_client_ca) = (None, None, None);
    access.auth_tokens_file = None;
    config.validate().context("--serve")?;
    Ok(config)
}

/// Waits until the worker is ready.
///
/// # Errors
///
/// When the worker's model cannot be served.
pub async fn is_ready(worker: &mut Worker) -> anyhow::Result<()> {
    let ready = worker.ready().await;
    ready.map(drop).context("the model cannot be served")
}

/// Starts a worker that listens, and becomes ready once its engine has loaded
/// the model.
///
/// # Errors
///
/// When the model or the addresses cannot be used.
pub async fn start(config: &ServeConfig) -> anyhow::Result<Worker> {
    // Errors in the access flags are reported before a model is compiled.
    rpc::Access::open(&config.access, &config.limits)?;
    if config.access.tokens_in_the_clear(config.network.listen) {
        tracing::warn!(
            "bearer tokens will cross the network unencrypted; give --tls-cert and --tls-key, or \
             let a proxy on this machine terminate TLS"
        );
    }
    let owned = config.clone();
    let load = move || -> anyhow::Result<_> {
        let (model, heads) = open_model(&owned)?;
        let engines = engines(&owned, &model, &heads.heads)?;
        Ok((model, heads, engines))
    };
    let (model, heads, engines) = tokio::task::spawn_blocking(load).await??;
    let worker = Worker::start(config, model, heads, engines).await?;
    if let Some(page) = config.access.page_address(worker.grpc_addr) {
        tracing::info!(page, "a page for browsers is served");
    }
    Ok(worker)
}

/// Opens the model that a worker with these flags serves, with its heads. The
/// model is compiled first if necessary.
///
/// # Errors
///
/// When the model does not exist or cannot be compiled, or a head does not fit
/// the model.
pub(crate) fn open_model(config: &ServeConfig) -> anyhow::Result<(Model, StartHeads)> {
    let mut bars = Bars::new();
    let folder = locate(config, &mut bars);
    bars.end();
    let folder = folder?;
    tracing::info!(folder = %folder.display(), "reading the model");
    let name = name(&config.model, &folder);
    let mut model = Model::open(&folder, name.as_deref())?;
    let heads = config.model.heads.iter().map(LinearHead::open);
    let heads = heads.collect::<Result<Vec<_>, _>>()?;
    for head in &heads {
        head.check(&model)?;
    }
    let mut heads = StartHeads::new(heads);
    if let Some(dir) = &config.model.head_dir {
        let added = heads.add_dir(dir, &config.model.heads, &model);
        added.with_context(|| format!("--head-dir {}", dir.display()))?;
    }
    if let Some(needs) = &config.model.needs {
        let of_heads = heads.heads.iter().map(|head| ModelNeed::Features {
            layers: vec![head.content.layer],
            norm: head.content.norm,
        });
        let needs: Vec<ModelNeed> = needs.iter().cloned().chain(of_heads).collect();
        model.serve_only(&needs);
    }
    Ok((model, heads))
}

/// Returns the model's name: the flag's, or that of the source that was
/// compiled, since the compiled directory in the cache has a name that means
/// nothing to a person. `None` leaves the name to the model's own directory.
fn name(config: &ModelConfig, folder: &Path) -> Option<String> {
    let given = config.model_name.clone();
    let source = Path::new(&config.model);
    if given.is_some() || source == folder {
        return given;
    }
    if let Some(repository) = snapshot_repository(source) {
        return Some(repository);
    }
    let name = source.file_name().map(ToOwned::to_owned).or_else(|| {
        // The source is a path such as `.`.
        let folder = source.canonicalize().ok()?;
        folder.file_name().map(ToOwned::to_owned)
    });
    name.map(|name| name.to_string_lossy().into_owned())
}

/// Finds the directory to serve, which is compiled first if necessary.
///
/// # Errors
///
/// When the model does not exist or cannot be compiled.
pub fn locate(config: &ServeConfig, progress: &mut dyn CompileProgress) -> anyhow::Result<PathBuf> {
    let library = onnx::find_library(config.model.library.onnxruntime.as_deref());
    let provider = match config.model.devices.provider.execution_provider {
        ProviderChoice::Cuda => Provider::Cuda,
        // A GPU that happens to be present is no reason to compile for a GPU.
        ProviderChoice::Cpu | ProviderChoice::Auto => Provider::Cpu,
    };
    let runtime = || {
        let runtime = Runtime::new(onnx::environment(&library)?, provider)?;
        // A provider that cannot run fails here, before everything but the last
        // trial is done.
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

    /// A snapshot in the cache of Hugging Face's tools is called like its
    /// repository, whatever leads to it.
    #[test]
    fn a_snapshot_of_a_hub_is_called_like_its_repository() {
        let cache = tempfile::tempdir().unwrap();
        let hash = "0123456789abcdef0123456789abcdef01234567";
        for (repository, expected) in [
            ("models--openai--imagegpt-small", "imagegpt-small"),
            ("models--imagegpt", "imagegpt"),
            ("datasets--openai--pictures", hash),
        ] {
            let snapshot = cache.path().join(repository).join("snapshots").join(hash);
            std::fs::create_dir_all(&snapshot).unwrap();
            let link = cache.path().join(format!("link-{repository}"));
            std::os::unix::fs::symlink(&snapshot, &link).unwrap();
            // Weights, which are compiled into a cache of the worker's own.
            let text = snapshot.to_str().unwrap();
            let config = own_config(text, &[], None).unwrap();
            let called = name(&config.model, Path::new("/cache/models/0123")).unwrap();
            assert_eq!(called, expected);
            // Graphs, which are served where they are.
            let micro = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/micro");
            for file in ["config.json", "preprocessor_config.json", "model.onnx"] {
                std::fs::copy(micro.join(file), snapshot.join(file)).unwrap();
            }
            for path in [&snapshot, &link] {
                assert_eq!(Model::open(path, None).unwrap().name, expected);
            }
        }
    }
}
