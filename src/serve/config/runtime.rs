//! Flags that a worker shares with other commands that run models: each is defined
//! here once, and flattened where it is needed.

use std::path::PathBuf;

use clap::Args;

use super::ConfigError;
use crate::model::precision::ProviderChoice;

/// As many GPUs as the largest machines have; each is a thread and a copy of the
/// model.
const DEVICES_MAX: usize = 16;

/// Where ONNX Runtime is.
#[derive(Debug, Clone, Args)]
pub struct LibraryFlags {
    /// ONNX Runtime's shared library, version 1.24 or newer [default: the copy
    /// beside the program, then the system's]
    #[arg(long, env = "ORT_DYLIB_PATH", value_name = "FILE")]
    pub onnxruntime: Option<PathBuf>,
}

/// Provider that runs the model.
#[derive(Debug, Clone, Args)]
pub struct ProviderFlags {
    /// What runs the model. auto takes CUDA if it can, and a worker says in the
    /// log and in GetModel what it took
    #[arg(
        long,
        env = "IMAGEGPT_EXECUTION_PROVIDER",
        value_enum,
        default_value = "auto"
    )]
    pub execution_provider: ProviderChoice,
}

/// Provider that runs the model, and its devices.
#[derive(Debug, Clone, Args)]
pub struct DeviceFlags {
    #[command(flatten)]
    pub provider: ProviderFlags,

    /// Which GPUs, counted from 0 among those that CUDA shows this process, at
    /// most 16. Each has the whole model and an engine of its own, and all take
    /// from the one queue; a GPU that fails is taken out while the others go on.
    /// On the CPU each number is one more engine, for tests and for machines with
    /// several sockets, and --intra-op-threads is an engine's: divide the cores
    /// by their number; auto takes one engine where it takes the CPU
    #[arg(
        long = "device-id",
        env = "IMAGEGPT_DEVICE_ID",
        default_value = "0",
        value_name = "N,N",
        value_delimiter = ',',
        value_parser = device_id()
    )]
    pub ids: Vec<i32>,
}

/// Where compiled models are.
#[derive(Debug, Clone, Args)]
pub struct CacheFlags {
    /// Where compiled models are kept [default: imagegpt/ in XDG_CACHE_HOME or
    /// ~/.cache]
    #[arg(long, env = "IMAGEGPT_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

/// Parses the number of a GPU.
pub(crate) fn device_id() -> clap::builder::RangedI64ValueParser<i32> {
    clap::value_parser!(i32).range(0..1024)
}

impl DeviceFlags {
    /// Whether a worker can have these devices.
    ///
    /// # Errors
    ///
    /// When they are too many, or one is named twice.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let ids = &self.ids;
        if ids.len() > DEVICES_MAX {
            return Err(ConfigError(format!(
                "--device-id has {} devices; a worker has at most {DEVICES_MAX}: start several",
                ids.len()
            )));
        }
        for (idx, id) in ids.iter().enumerate() {
            if ids[..idx].contains(id) {
                return Err(ConfigError(format!(
                    "--device-id has {id} twice; one engine is what a device can do"
                )));
            }
        }
        Ok(())
    }
}
