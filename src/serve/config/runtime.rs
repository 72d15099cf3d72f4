//! Flags that `serve` shares with other commands that run models: each flag is
//! defined here once, and flattened into the commands that need it.

use std::path::PathBuf;

use clap::Args;

use super::ConfigError;
use crate::model::precision::ProviderChoice;
use crate::runtime::GpuCopies;

/// Largest number of devices of a worker: the GPUs of the largest machines.
/// Each device costs a thread and a copy of the model.
const DEVICES_MAX: usize = 16;

/// Location of ONNX Runtime.
#[derive(Debug, Clone, Args)]
pub struct LibraryFlags {
    /// ONNX Runtime's shared library, version 1.24 or newer [default: the copy
    /// beside the program, then that of the Python environment in which the
    /// program is installed, then the system's]
    #[arg(long, env = "ORT_DYLIB_PATH", value_name = "FILE")]
    pub onnxruntime: Option<PathBuf>,
}

/// Execution provider that runs the model.
#[derive(Debug, Clone, Args)]
pub struct ProviderFlags {
    /// Execution provider that runs the model. auto uses CUDA if that works and
    /// the CPU otherwise; a worker reports its choice in the log and in
    /// GetModel
    #[arg(
        long,
        env = "IMAGEGPT_EXECUTION_PROVIDER",
        value_enum,
        default_value = "auto"
    )]
    pub execution_provider: ProviderChoice,
}

/// Execution provider that runs the model, and its devices.
#[derive(Debug, Clone, Args)]
pub struct DeviceFlags {
    #[command(flatten)]
    pub provider: ProviderFlags,

    /// GPUs that run the model, at most 16, by their numbers among the GPUs
    /// that CUDA shows this process, counted from 0.
    ///
    /// Each GPU has an engine with the whole model, and all engines take work
    /// from one queue; if a GPU fails, the others continue without it. With
    /// --execution-provider cpu each number adds an engine, for tests and for
    /// machines with several sockets; --intra-op-threads then applies to each
    /// engine, so divide the cores by the number of engines. If auto falls back
    /// to the CPU, it uses one engine
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

/// Program that copies between the host and a GPU.
#[derive(Debug, Clone, Args)]
pub struct GpuCopiesFlags {
    /// Program that copies inputs and outputs between the host and a GPU. driver
    /// takes no lock that other GPUs of the worker share, and two buffers of
    /// pinned memory per GPU, of at most 256 MiB each; if the driver refuses, ONNX
    /// Runtime copies, which the log, GetModel and a metric report. driver has
    /// not run on a GPU yet, and its speed has not been measured
    #[arg(
        long,
        env = "IMAGEGPT_GPU_COPIES",
        value_enum,
        default_value = "onnxruntime"
    )]
    pub gpu_copies: GpuCopies,
}

/// Location of compiled models.
#[derive(Debug, Clone, Args)]
pub struct CacheFlags {
    /// Directory in which compiled models are kept [default: imagegpt/ in
    /// XDG_CACHE_HOME or ~/.cache]
    #[arg(long, env = "IMAGEGPT_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

/// Returns the parser of a GPU's number, from 0 to 1023.
pub(crate) fn device_id() -> clap::builder::RangedI64ValueParser<i32> {
    clap::value_parser!(i32).range(0..1024)
}

impl DeviceFlags {
    /// Checks that a worker can use these devices.
    ///
    /// # Errors
    ///
    /// Fails if there are too many devices, or if a device is named twice.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let ids = &self.ids;
        if ids.len() > DEVICES_MAX {
            return Err(ConfigError(format!(
                "--device-id has {} devices; a worker has at most {DEVICES_MAX}: start several \
                 workers",
                ids.len()
            )));
        }
        for (idx, id) in ids.iter().enumerate() {
            if ids[..idx].contains(id) {
                return Err(ConfigError(format!(
                    "--device-id has {id} twice; each device can have only one engine"
                )));
            }
        }
        Ok(())
    }
}
