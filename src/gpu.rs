//! Finds the GPUs of this process, for metrics, GetModel and `imagegpt doctor`.
//!
//! Nothing here is needed to serve. The libraries belong to the NVIDIA driver
//! and are loaded on demand; a machine without them has no GPUs, and a reason
//! why. CUDA's driver lists the devices that the process sees, in the order
//! that --device-id counts. NVML sees the whole machine, in another order, and
//! reports the devices' usage. UUIDs join the two.

pub(crate) mod context;
pub(crate) mod copies;
mod driver;
pub mod kernels;
mod nvml;

use std::fmt;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::files::hex;

/// A GPU, or a part of one (MIG), that this process sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Device number, as --device-id counts.
    pub id: i32,
    pub name: String,
    /// UUID as nvidia-smi writes it: `GPU-…`, or `MIG-…` for a part of a GPU.
    pub uuid: String,
    pub memory_bytes: u64,
    /// Compute capability for which kernels must be compiled, such as 9.0.
    pub compute_capability: Version,
}

/// Usage of a GPU at one moment. Figures that the GPU does not report are
/// `None`: a part of a GPU has no utilization, and a GPU that shares the host's
/// memory has no memory of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuUsage {
    pub memory: Option<MemoryUse>,
    /// Share of the last moments in which the GPU was computing, 0 to 1.
    pub utilization: Option<f64>,
    pub power_watts: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// Memory in use by all processes on the GPU.
    pub used_bytes: u64,
    pub total_bytes: u64,
}

/// Version of a major and a minor number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Version {
    pub major: i32,
    pub minor: i32,
}

impl Version {
    /// Reads a version of CUDA as its libraries write it: 13000 is 13.0.
    fn of_cuda(number: i32) -> Self {
        Self {
            major: number / 1000,
            minor: number % 1000 / 10,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.to_string()
    }
}

/// GPUs that were found, or the reason why there are none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpus {
    /// Devices in the order that --device-id counts.
    pub devices: Vec<Gpu>,
    /// Version of the installed driver, such as 580.82.07.
    pub driver_version: Option<String>,
    /// The newest CUDA that this driver can run.
    pub cuda_version: Option<Version>,
    /// Reason why there are no devices.
    pub absent: Option<String>,
}

impl TryFrom<String> for Version {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = |part: &str| part.parse().ok();
        let parts = text.split_once('.');
        parts
            .and_then(|(major, minor)| Some((number(major)?, number(minor)?)))
            .map(|(major, minor)| Self { major, minor })
            .ok_or_else(|| format!("{text} is not a version such as 12.8"))
    }
}

impl Gpus {
    /// Returns the device that --device-id names.
    #[must_use]
    pub fn device(&self, id: i32) -> Option<&Gpu> {
        self.devices.iter().find(|device| device.id == id)
    }
}

/// Answers of CUDA's driver.
#[derive(Debug)]
struct Driver {
    version: Version,
    devices: Result<Vec<CudaDevice>, String>,
}

/// One device, as CUDA's driver describes it.
#[derive(Debug)]
struct CudaDevice {
    uuid: [u8; 16],
    name: String,
    memory_bytes: u64,
    compute_capability: Version,
}

/// Queries to NVML. A query may take long, and forever if a driver hangs, so it
/// is never made on a thread for which others wait.
trait Management: Send + Sync {
    fn driver_version(&self) -> Option<String>;
    /// Returns true if there is a device of this UUID.
    fn knows(&self, uuid: &str) -> bool;
    fn usage(&self, uuid: &str) -> GpuUsage;
}

/// Finds the GPUs once, and reads their usage again and again.
pub struct Monitor {
    pub gpus: Gpus,
    /// Access to NVML. Without NVML (in a container without the capability
    /// `utility`) the devices are still known; only their usage is not.
    management: Option<Box<dyn Management>>,
}

impl Monitor {
    /// Loads the driver's libraries and finds the devices. Blocks, for a second
    /// if the driver must wake up.
    #[must_use]
    pub fn open() -> Self {
        let management = nvml::open();
        Self::join(driver::look(), management)
    }

    fn join(driver: Result<Driver, String>, management: Option<Box<dyn Management>>) -> Self {
        let mut gpus = Gpus {
            driver_version: management.as_ref().and_then(|nvml| nvml.driver_version()),
            ..Gpus::default()
        };
        let devices = driver.and_then(|driver| {
            gpus.cuda_version = Some(driver.version);
            driver.devices
        });
        match devices {
            Ok(devices) if devices.is_empty() => {
                gpus.absent = Some("the driver shows this process no GPU".to_owned());
            }
            Ok(devices) => {
                let ids = 0_i32..;
                let named = ids.zip(devices).map(|(id, device)| Gpu {
                    id,
                    uuid: uuid_text(&device, management.as_deref()),
                    name: device.name,
                    memory_bytes: device.memory_bytes,
                    compute_capability: device.compute_capability,
                });
                gpus.devices = named.collect();
            }
            Err(reason) => gpus.absent = Some(reason),
        }
        Self { gpus, management }
    }

    /// Returns the current usage of the devices with these ids. Blocks.
    #[must_use]
    pub fn usage(&self, ids: &[i32]) -> Vec<(i32, GpuUsage)> {
        let Some(management) = &self.management else {
            return Vec::new();
        };
        ids.iter()
            .filter_map(|&id| self.gpus.device(id))
            .map(|gpu| (gpu.id, management.usage(&gpu.uuid)))
            .collect()
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Monitor").field(&self.gpus).finish()
    }
}

/// GPUs as the worker knows them: nothing, until they were looked for.
#[derive(Debug, Clone, Default)]
pub struct KnownGpus(Arc<OnceLock<Gpus>>);

impl KnownGpus {
    pub fn set(&self, gpus: Gpus) {
        // The GPUs are looked for only once.
        let _ = self.0.set(gpus);
    }

    #[must_use]
    pub fn get(&self) -> Option<&Gpus> {
        self.0.get()
    }
}

/// Formats the UUID of a device. CUDA gives sixteen bytes for whole GPUs and
/// for parts of GPUs alike, but NVML knows which of both a device is. Without
/// NVML the name tells: a part's name ends in `MIG 1g.10gb`.
fn uuid_text(device: &CudaDevice, management: Option<&dyn Management>) -> String {
    let text = |kind: &str| {
        let hex = hex(&device.uuid);
        let groups = [0..8, 8..12, 12..16, 16..20, 20..32].map(|group| &hex[group]);
        format!("{kind}-{}", groups.join("-"))
    };
    let known = ["GPU", "MIG"]
        .map(text)
        .into_iter()
        .find(|uuid| management.is_some_and(|nvml| nvml.knows(uuid)));
    known.unwrap_or_else(|| {
        text(if device.name.contains(" MIG ") {
            "MIG"
        } else {
            "GPU"
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU_A: &str = "GPU-00000000-0000-0000-0000-00000000000a";
    const GPU_B: &str = "GPU-00000000-0000-0000-0000-00000000000b";
    const MIG_C: &str = "MIG-00000000-0000-0000-0000-00000000000c";

    /// NVML of a machine with devices of these UUIDs, of which the last is the
    /// fullest.
    struct Nvml(Vec<&'static str>);

    impl Management for Nvml {
        fn driver_version(&self) -> Option<String> {
            Some("580.82.07".to_owned())
        }

        fn knows(&self, uuid: &str) -> bool {
            self.0.contains(&uuid)
        }

        fn usage(&self, uuid: &str) -> GpuUsage {
            let idx = self.0.iter().position(|known| *known == uuid);
            GpuUsage {
                memory: idx.map(|idx| MemoryUse {
                    used_bytes: idx as u64,
                    total_bytes: 80,
                }),
                ..GpuUsage::default()
            }
        }
    }

    fn device(last: u8, name: &str) -> CudaDevice {
        let mut uuid = [0; 16];
        uuid[15] = last;
        CudaDevice {
            uuid,
            name: name.to_owned(),
            memory_bytes: 80,
            compute_capability: Version { major: 9, minor: 0 },
        }
    }

    fn driver(devices: Vec<CudaDevice>) -> Driver {
        Driver {
            version: Version::of_cuda(13_020),
            devices: Ok(devices),
        }
    }

    fn nvml(uuids: &[&'static str]) -> Box<dyn Management> {
        Box::new(Nvml(uuids.to_vec()))
    }

    fn uuids(monitor: &Monitor) -> Vec<&str> {
        let devices = monitor.gpus.devices.iter();
        devices.map(|device| device.uuid.as_str()).collect()
    }

    #[test]
    fn ids_are_cudas_and_usage_is_that_of_the_same_device() {
        // CUDA_VISIBLE_DEVICES=1,0: NVML sees the devices in the opposite
        // order.
        let devices = vec![device(0xb, "B"), device(0xa, "A")];
        let monitor = Monitor::join(Ok(driver(devices)), Some(nvml(&[GPU_A, GPU_B])));
        assert_eq!(uuids(&monitor), [GPU_B, GPU_A]);
        assert_eq!(monitor.gpus.device(1).unwrap().name, "A");
        assert_eq!(monitor.gpus.device(2), None);
        let used = |ids: &[i32]| -> Vec<(i32, u64)> {
            let usage = monitor.usage(ids).into_iter();
            usage
                .map(|(id, usage)| (id, usage.memory.unwrap().used_bytes))
                .collect()
        };
        assert_eq!(used(&[0, 1]), [(0, 1), (1, 0)]);
        assert_eq!(used(&[1, 7]), [(1, 0)], "there is no device 7");
    }

    #[test]
    fn versions_are_read_as_cuda_writes_them() {
        let monitor = Monitor::join(Ok(driver(vec![device(0xa, "A")])), Some(nvml(&[GPU_A])));
        let gpus = &monitor.gpus;
        assert_eq!(gpus.cuda_version.unwrap().to_string(), "13.2");
        assert_eq!(gpus.driver_version.as_deref(), Some("580.82.07"));
        assert_eq!(gpus.absent, None);
    }

    #[test]
    fn a_part_of_a_gpu_has_a_uuid_of_its_own_kind() {
        let part = || vec![device(0xc, "NVIDIA H100 80GB HBM3 MIG 1g.10gb")];
        let monitor = Monitor::join(Ok(driver(part())), Some(nvml(&[GPU_A, MIG_C])));
        assert_eq!(uuids(&monitor), [MIG_C]);
        assert_eq!(monitor.usage(&[0])[0].1.memory.unwrap().used_bytes, 1);
        // The same without NVML, by the device's name.
        let monitor = Monitor::join(Ok(driver(part())), None);
        assert_eq!(uuids(&monitor), [MIG_C]);
        assert_eq!(monitor.usage(&[0]), []);
        assert_eq!(monitor.gpus.driver_version, None);
    }

    #[test]
    fn absence_has_a_reason() {
        let check = |driver, nvml, expected: &str| {
            let monitor = Monitor::join(driver, nvml);
            assert_eq!(monitor.gpus.absent.as_deref(), Some(expected));
            assert_eq!(monitor.gpus.devices, []);
            monitor.gpus.cuda_version
        };
        assert_eq!(check(Err("no driver".to_owned()), None, "no driver"), None);
        check(
            Ok(driver(Vec::new())),
            Some(nvml(&[GPU_A])),
            "the driver shows this process no GPU",
        );
        // A driver that cannot start still reports its version.
        let broken = Ok(Driver {
            version: Version::of_cuda(12_080),
            devices: Err("cuInit: system not yet initialized".to_owned()),
        });
        let version = check(broken, None, "cuInit: system not yet initialized");
        assert_eq!(version.unwrap().to_string(), "12.8");
    }

    #[test]
    fn this_machine_is_looked_at_without_harm() {
        let monitor = Monitor::open();
        assert_eq!(
            monitor.gpus.absent.is_some(),
            monitor.gpus.devices.is_empty()
        );
    }
}
