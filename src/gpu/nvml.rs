//! Asks NVML, libnvidia-ml.so.1, for the driver's version and the devices'
//! usage.

use std::ffi::OsStr;

use nvml_wrapper::{Device, Nvml};

use super::{GpuUsage, Management, MemoryUse};

/// Library as the driver installs it. The name without a version exists only
/// where programs are compiled for NVML.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// Loads and starts NVML, if the library is installed.
pub(super) fn open() -> Option<Box<dyn Management>> {
    match Nvml::builder().lib_path(OsStr::new(LIBRARY)).init() {
        Ok(nvml) => Some(Box::new(nvml)),
        Err(error) => {
            tracing::debug!(%error, "NVML cannot be used: the usage of GPUs is not known");
            None
        }
    }
}

impl Management for Nvml {
    fn driver_version(&self) -> Option<String> {
        self.sys_driver_version().ok()
    }

    fn knows(&self, uuid: &str) -> bool {
        self.device_by_uuid(uuid).is_ok()
    }

    fn usage(&self, uuid: &str) -> GpuUsage {
        self.device_by_uuid(uuid)
            .map_or_else(|_| GpuUsage::default(), |device| usage_of(&device))
    }
}

/// Reads each figure separately: a figure that one kind of device does not
/// report, another does.
fn usage_of(device: &Device<'_>) -> GpuUsage {
    let memory = device.memory_info().ok();
    let rates = device.utilization_rates().ok();
    let milliwatts = device.power_usage().ok();
    GpuUsage {
        memory: memory.map(|memory| MemoryUse {
            used_bytes: memory.used,
            total_bytes: memory.total,
        }),
        utilization: rates.map(|rates| f64::from(rates.gpu) / 100.0),
        power_watts: milliwatts.map(|milliwatts| f64::from(milliwatts) / 1000.0),
    }
}
