//! Judgment of the findings. Nothing here looks at the machine, so that tests
//! can invent any machine.

mod cuda;

use std::collections::BTreeMap;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use super::cache::CacheFinding;
use super::library::{CudaProvider, Library};
use super::machine::MachineLimits;
use super::report::{Check, CheckOutcome, DeviceReport, DoctorReport};
use super::trial::Tried;
use crate::gpu::{GpuUsage, Gpus};
use crate::model::precision::{Provider, ProviderChoice};
use crate::runtime::MINOR_VERSION_MIN;

/// Memory below which the doctor warns: a worker of imagegpt-small takes 0.6
/// GiB (`make bench-memory`), and requests in flight take more.
const MEMORY_MIN: u64 = 1 << 30;
/// Free disk space below which the doctor warns: imagegpt-small takes 0.35 GiB
/// in fp32 and is written completely before it is moved to its place.
const SPACE_MIN: u64 = 1 << 30;
/// Limit on open files below which the doctor warns: 1024 connections
/// (--connections-max), and as many again for files, probes and connections in
/// the TLS handshake.
const OPEN_FILES_MIN: u64 = 2048;

/// Provider and GPUs that the worker is to serve with.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) provider: ProviderChoice,
    pub(super) device_ids: Vec<i32>,
}

/// All findings about the machine.
#[derive(Debug, Clone)]
pub(super) struct MachineFindings {
    pub(super) machine: MachineLimits,
    pub(super) cache: CacheFinding,
    pub(super) library: Library,
    /// `None` if there is no usable ONNX Runtime, or CUDA was not asked for.
    pub(super) cuda: Option<CudaProvider>,
    /// Findings of the driver and NVML, or the reason why neither answered.
    pub(super) gpus: Result<DriverFindings, String>,
    /// Value of `CUDA_VISIBLE_DEVICES`.
    pub(super) visible_devices: Option<String>,
}

/// Findings of the driver and NVML.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct DriverFindings {
    pub(super) gpus: Gpus,
    pub(super) usage: Vec<(i32, GpuUsage)>,
}

/// Result of one check, before it is known whether the result matters.
#[derive(Debug, Clone)]
enum Finding {
    Fine(String),
    /// A worker serves, but not well; with advice.
    Doubt(String, Option<String>),
    /// A worker does not serve; with advice.
    Bad(String, Option<String>),
}

impl Finding {
    fn bad(found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self::Bad(found.into(), Some(todo.into()))
    }

    fn doubt(found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self::Doubt(found.into(), Some(todo.into()))
    }

    /// Returns the reason why a worker cannot serve, in one sentence.
    fn obstacle(&self) -> Option<String> {
        match self {
            Self::Bad(found, Some(todo)) => Some(format!("{found}: {todo}")),
            Self::Bad(found, None) => Some(found.clone()),
            _ => None,
        }
    }

    /// Converts the finding to a line of the report; a bad finding gets the
    /// result `bad`.
    fn check(self, name: &str, bad: CheckOutcome) -> Check {
        let (result, found, todo) = match self {
            Self::Fine(found) => (CheckOutcome::Ok, found, None),
            Self::Doubt(found, todo) => (CheckOutcome::Warning, found, todo),
            Self::Bad(found, todo) => (bad, found, todo),
        };
        Check {
            name: name.to_owned(),
            result,
            found,
            todo,
        }
    }
}

/// Findings about one provider, and the first reason why it cannot serve.
#[derive(Default)]
struct Side {
    findings: Vec<(String, Finding)>,
    obstacle: Option<String>,
}

impl Side {
    fn new(findings: Vec<(String, Finding)>) -> Self {
        let obstacle = findings.iter().find_map(|(_, finding)| finding.obstacle());
        Self { findings, obstacle }
    }

    /// Runs a model, unless an earlier finding rules that out.
    fn try_out(&mut self, name: String, run: impl FnOnce() -> Tried) {
        if self.obstacle.is_some() {
            let finding = Finding::Bad("not tried: see above".to_owned(), None);
            self.findings.push((name, finding));
            return;
        }
        let finding = match run() {
            Tried::Passed(text) => Finding::Fine(text),
            Tried::Failed(reason) => Finding::Bad(reason, None),
            Tried::Untried(reason) => Finding::doubt(
                format!("not tried: {reason}"),
                "name a directory with --model",
            ),
        };
        self.obstacle = finding.obstacle();
        self.findings.push((name, finding));
    }

    fn checks(self, bad: CheckOutcome) -> impl Iterator<Item = Check> {
        let findings = self.findings.into_iter();
        findings.map(move |(name, finding)| finding.check(&name, bad))
    }
}

/// Judges the findings; `try_out` runs a model on a provider and a device.
pub(super) fn judge(
    asked: &Asked,
    found: &MachineFindings,
    try_out: &mut dyn FnMut(Provider, i32) -> Tried,
) -> DoctorReport {
    let library = library(&found.library);
    let mut cpu = Side {
        obstacle: library.obstacle(),
        ..Side::default()
    };
    let mut cuda = Side::new(cuda::findings(asked, found));
    let (wants_cpu, wants_cuda) = (
        asked.provider != ProviderChoice::Cuda,
        asked.provider != ProviderChoice::Cpu,
    );
    if wants_cpu {
        cpu.try_out("inference on cpu".to_owned(), || try_out(Provider::Cpu, 0));
    }
    if wants_cuda {
        for &id in &asked.device_ids {
            cuda.try_out(format!("inference on cuda:{id}"), || {
                try_out(Provider::Cuda, id)
            });
        }
    }
    let sides = [("cpu", wants_cpu, &cpu), ("cuda", wants_cuda, &cuda)];
    let asked_for = || sides.iter().filter(|(_, is_wanted, _)| *is_wanted);
    let providers: Vec<&str> = asked_for()
        .filter(|(_, _, side)| side.obstacle.is_none())
        .map(|(name, ..)| *name)
        .collect();
    let obstacles: BTreeMap<&str, String> = asked_for()
        .filter_map(|(name, _, side)| Some((*name, side.obstacle.clone()?)))
        .collect();
    let can_serve = !providers.is_empty();

    let mut checks = machine(found);
    checks.push(library.check("ONNX Runtime", CheckOutcome::Failed));
    // If one of the two providers can serve, problems of the other are only
    // warnings.
    let bad = |is_there: bool| match (can_serve, is_there) {
        (false, _) => CheckOutcome::Failed,
        (true, true) => CheckOutcome::Warning,
        (true, false) => CheckOutcome::NotNeeded,
    };
    checks.extend(cpu.checks(bad(true)));
    if wants_cuda {
        // A broken driver counts as present.
        let has_gpu = found
            .gpus
            .as_ref()
            .map_or(true, |DriverFindings { gpus, .. }| {
                !gpus.devices.is_empty() || gpus.driver_version.is_some()
            });
        let is_asked = asked.provider == ProviderChoice::Cuda;
        checks.extend(cuda.checks(bad(has_gpu || is_asked)));
    } else {
        checks.push(Check {
            name: "CUDA".to_owned(),
            result: CheckOutcome::NotNeeded,
            found: "not checked: --execution-provider is cpu".to_owned(),
            todo: None,
        });
    }
    DoctorReport {
        can_serve,
        providers,
        obstacles,
        checks,
        gpus: devices(found),
    }
}

fn devices(found: &MachineFindings) -> Vec<DeviceReport> {
    let Ok(DriverFindings { gpus, usage }) = &found.gpus else {
        return Vec::new();
    };
    let usage = |id| usage.iter().find(|(other, _)| *other == id);
    let devices = gpus.devices.iter();
    devices
        .map(|gpu| DeviceReport {
            gpu: gpu.clone(),
            usage: usage(gpu.id).map(|(_, usage)| *usage).unwrap_or_default(),
        })
        .collect()
}

fn library(library: &Library) -> Finding {
    let path = library.path.display();
    match &library.minor {
        Ok(minor) if *minor < MINOR_VERSION_MIN => Finding::bad(
            format!("{path} is version 1.{minor}"),
            format!(
                "name a library of version 1.{MINOR_VERSION_MIN} or newer with --onnxruntime or \
                 ORT_DYLIB_PATH: pip install onnxruntime"
            ),
        ),
        Ok(minor) => Finding::Fine(format!(
            "version 1.{minor} (1.{MINOR_VERSION_MIN} or newer is needed), {path}"
        )),
        Err(reason) => Finding::bad(
            format!("{path} cannot be used ({reason})"),
            "install one beside the program (pip install 'imagegpt[cpu]', or 'imagegpt[gpu]' for a \
             GPU), or name a libonnxruntime.so with --onnxruntime or ORT_DYLIB_PATH: pip install \
             onnxruntime, or onnxruntime-gpu for a GPU",
        ),
    }
}

/// Checks of what all providers depend on. A warning here keeps no worker from
/// serving.
fn machine(found: &MachineFindings) -> Vec<Check> {
    let machine = &found.machine;
    let findings = [
        ("CPU", cpu(machine)),
        ("memory", memory(machine)),
        ("huge pages", huge_pages(machine)),
        ("open files", open_files(machine)),
        ("compiled models", compiled_models(&found.cache)),
    ];
    let findings = findings.into_iter();
    findings
        .map(|(name, finding)| finding.check(name, CheckOutcome::Failed))
        .collect()
}

fn cpu(machine: &MachineLimits) -> Finding {
    let cpu = &machine.cpu;
    let (there, missing) = cpu.extensions();
    let list = |names: Vec<&str>| match names.as_slice() {
        [] => "none".to_owned(),
        some => some.join(", "),
    };
    let quota = match cpu.quota {
        Some(quota) => format!(" (cgroup limit {quota:.1})"),
        None => String::new(),
    };
    let is_slow = !there.contains(&"AVX2");
    let text = format!(
        "{}, {} of {} CPUs{quota}; has {}; lacks {}",
        cpu.model.as_deref().unwrap_or("model unknown"),
        cpu.usable(),
        cpu.n_cpus,
        list(there),
        list(missing)
    );
    if is_slow {
        return Finding::doubt(
            text,
            "attention runs without vector instructions, which is slower; use a CPU with AVX2",
        );
    }
    Finding::Fine(text)
}

fn memory(machine: &MachineLimits) -> Finding {
    let memory = &machine.memory;
    let size = |bytes: Option<u64>| {
        bytes.map_or_else(|| "unknown".to_owned(), |bytes| ByteSize(bytes).to_string())
    };
    let limit = match memory.limit {
        Some(limit) => format!(", cgroup limit {}", ByteSize(limit)),
        None => String::new(),
    };
    let text = format!(
        "{}{limit}; {} available",
        size(memory.total),
        size(memory.available)
    );
    match memory.usable() {
        Some(usable) if usable < MEMORY_MIN => Finding::doubt(
            text,
            format!(
                "provide at least {}: imagegpt-small takes 0.6 GiB, and requests in flight take \
                 more (--bytes-in-flight-max)",
                ByteSize(MEMORY_MIN)
            ),
        ),
        _ => Finding::Fine(text),
    }
}

fn huge_pages(machine: &MachineLimits) -> Finding {
    match machine.huge_pages.as_deref() {
        Some("never") => Finding::doubt(
            "transparent huge pages are off",
            "write madvise into /sys/kernel/mm/transparent_hugepage/enabled on the node: on a CPU, \
             generation then reads its key/value cache faster",
        ),
        Some(mode) => Finding::Fine(format!("transparent, {mode}")),
        None => Finding::Fine("unknown".to_owned()),
    }
}

fn open_files(machine: &MachineLimits) -> Finding {
    match machine.open_files_max {
        Some(max) if max < OPEN_FILES_MIN => Finding::doubt(
            format!("limit {max}"),
            format!(
                "raise the limit (ulimit -n {OPEN_FILES_MIN}), or lower --connections-max to {}",
                max / 2
            ),
        ),
        Some(u64::MAX) => Finding::Fine("no limit".to_owned()),
        Some(max) => Finding::Fine(format!("limit {max}")),
        None => Finding::Fine("limit unknown".to_owned()),
    }
}

fn compiled_models(cache: &CacheFinding) -> Finding {
    let only = "only models that are not compiled yet need this directory";
    let folder = match &cache.folder {
        Ok(folder) => folder.display(),
        Err(reason) => return Finding::doubt(reason, format!("set --cache-dir; {only}")),
    };
    match cache.space {
        Ok(bytes) if bytes < SPACE_MIN => Finding::doubt(
            format!("{folder}, {} free", ByteSize(bytes)),
            format!("free some space or use another --cache-dir; {only}"),
        ),
        Ok(bytes) => Finding::Fine(format!("{folder}, {} free", ByteSize(bytes))),
        Err(ref reason) => Finding::doubt(
            format!("{folder} cannot be written ({reason})"),
            format!("use another --cache-dir; {only}"),
        ),
    }
}

#[cfg(test)]
mod tests;
