//! Checks of what CUDA needs: a driver, a GPU, ONNX Runtime's provider, and the
//! libraries that the provider is linked with.

use bytesize::ByteSize;

use super::{Asked, DriverFindings, Finding, MachineFindings};
use crate::commands::doctor::library::{CudaProvider, Needed};
use crate::gpu::{Gpu, GpuUsage, Version};
use crate::runtime::python::packages_around;

/// Ranges of compute capabilities, first to last, for which the provider of the
/// package onnxruntime-gpu 1.31.1 has all its kernels. The headers of its
/// section .nv_fatbin list all kernels for sm_80, 86, 89, 90 and 120a, two
/// thirds of them for sm_75, none for sm_100, and no PTX that a driver could
/// compile. Within a major number, a kernel runs on its own minor number and on
/// later ones, except for kernels with an `a`.
const KERNELS: [(Version, Version); 3] = [
    (version(8, 0), version(8, 9)),
    (version(9, 0), version(9, 0)),
    (version(12, 0), version(12, 0)),
];
/// CUDA version that is assumed if the provider's libraries do not tell.
const CUDA_MAJOR: i32 = 13;
/// Oldest driver for each CUDA version, from CUDA's release notes.
const DRIVERS: [(i32, u32); 2] = [(12, 525), (13, 580)];

const fn version(major: i32, minor: i32) -> Version {
    Version { major, minor }
}

/// Returns the findings, in the order in which to solve them.
pub(super) fn findings(asked: &Asked, found: &MachineFindings) -> Vec<(String, Finding)> {
    let provider = found.cuda.as_ref();
    let major = provider
        .and_then(CudaProvider::cuda_major)
        .unwrap_or(CUDA_MAJOR);
    [
        ("NVIDIA driver", driver(found, major)),
        ("GPUs", gpus(asked, found)),
        ("CUDA provider", provider_files(found)),
        ("CUDA libraries", libraries(found, major)),
    ]
    .map(|(name, finding)| (name.to_owned(), finding))
    .into()
}

/// Describes the driver that a CUDA version needs.
fn driver_wanted(major: i32) -> String {
    match DRIVERS.iter().find(|(cuda, _)| *cuda == major) {
        Some((_, driver)) => format!("driver {driver} or newer"),
        None => format!("a driver for CUDA {major}"),
    }
}

fn driver(found: &MachineFindings, major: i32) -> Finding {
    let gpus = match &found.gpus {
        Ok(seen) => &seen.gpus,
        Err(reason) => {
            return Finding::bad(
                format!("NVIDIA's driver (libcuda.so.1, libnvidia-ml.so.1): {reason}"),
                "see whether nvidia-smi answers, look for NVRM and Xid in dmesg, then restart the \
                 machine or its driver; if the GPUs only wake up slowly, raise --look-timeout",
            );
        }
    };
    let Some(cuda) = gpus.cuda_version else {
        let reason = gpus.absent.clone();
        return Finding::bad(
            reason.unwrap_or_else(|| "the NVIDIA driver reports no version".to_owned()),
            format!(
                "install NVIDIA's {}; in a container, let the container runtime provide it \
                 (docker run --gpus all, or a limit of nvidia.com/gpu in Kubernetes)",
                driver_wanted(major)
            ),
        );
    };
    let text = match &gpus.driver_version {
        Some(driver) => format!("version {driver}, for CUDA up to {cuda}"),
        None => format!("for CUDA up to {cuda}; NVML reports no driver version"),
    };
    if cuda.major < major {
        return Finding::bad(
            text,
            format!(
                "the CUDA provider is for CUDA {major}: install {}, or an onnxruntime-gpu for \
                 CUDA {}",
                driver_wanted(major),
                cuda.major
            ),
        );
    }
    Finding::Fine(text)
}

fn gpus(asked: &Asked, found: &MachineFindings) -> Finding {
    let Ok(DriverFindings { gpus, usage }) = &found.gpus else {
        return Finding::Bad("unknown, since the driver gave no answer".to_owned(), None);
    };
    let visible = match &found.visible_devices {
        Some(list) => format!(" (CUDA_VISIBLE_DEVICES={list})"),
        None => String::new(),
    };
    if gpus.devices.is_empty() {
        if gpus.cuda_version.is_none() {
            return Finding::Bad("unknown without a driver".to_owned(), None);
        }
        let reason = gpus.absent.as_deref().unwrap_or("CUDA shows no GPUs");
        return Finding::bad(
            format!("{reason}{visible}"),
            "see whether nvidia-smi shows the GPUs, make them available to the container, and \
             check CUDA_VISIBLE_DEVICES",
        );
    }
    let n_devices = gpus.devices.len();
    let missing = asked
        .device_ids
        .iter()
        .find(|id| gpus.device(**id).is_none());
    if let Some(missing) = missing {
        return Finding::bad(
            format!(
                "there is no GPU {missing}; the number of GPUs that CUDA shows is \
                 {n_devices}{visible}"
            ),
            format!("--device-id counts from 0 to {}", n_devices - 1),
        );
    }
    let list: Vec<String> = gpus.devices.iter().map(|gpu| line(gpu, usage)).collect();
    let text = format!("{}{visible}", list.join("; "));
    let asked = asked.device_ids.iter().filter_map(|&id| gpus.device(id));
    let mut without = asked.filter(|gpu| !has_kernels(gpu.compute_capability));
    match without.next() {
        None => Finding::Fine(text),
        Some(gpu) => Finding::doubt(
            text,
            format!(
                "onnxruntime-gpu 1.31 has its kernels for compute capabilities {}; the inference \
                 below shows whether this build has kernels for {}",
                kernels(),
                gpu.compute_capability
            ),
        ),
    }
}

fn line(gpu: &Gpu, usage: &[(i32, GpuUsage)]) -> String {
    let usage = usage.iter().find(|(id, _)| *id == gpu.id);
    let memory = usage.and_then(|(_, usage)| usage.memory);
    let used = match memory {
        Some(memory) => format!(", {} in use", ByteSize(memory.used_bytes)),
        None => String::new(),
    };
    format!(
        "{}: {}, {}{used}, compute capability {}",
        gpu.id,
        gpu.name,
        ByteSize(gpu.memory_bytes),
        gpu.compute_capability
    )
}

fn has_kernels(capability: Version) -> bool {
    KERNELS
        .iter()
        .any(|(from, to)| (*from..=*to).contains(&capability))
}

fn kernels() -> String {
    let ranges = KERNELS.map(|(from, to)| {
        if from == to {
            from.to_string()
        } else {
            format!("{from} to {to}")
        }
    });
    ranges.join(", ")
}

fn provider_files(found: &MachineFindings) -> Finding {
    let (Some(provider), Some(folder)) = (&found.cuda, &found.library.folder) else {
        return Finding::Bad("unknown without a usable ONNX Runtime".to_owned(), None);
    };
    let packages = packages_around(folder);
    let folder = folder.display();
    if let Some(reason) = &provider.unreadable {
        return Finding::bad(
            reason,
            "reinstall it: pip install --force-reinstall onnxruntime-gpu",
        );
    }
    if provider.missing_files.is_empty() {
        return Finding::Fine(format!("in {folder}"));
    }
    let text = format!("{} not in {folder}", are(&provider.missing_files));
    if let Some(packages) = packages {
        // The two packages have the same directory, and pip does not notice.
        return Finding::bad(
            text,
            format!(
                "pip uninstall onnxruntime, and pip install 'imagegpt[gpu]', for the Python of {}",
                packages.display()
            ),
        );
    }
    Finding::bad(
        text,
        "pip install onnxruntime-gpu, and name its libonnxruntime.so with --onnxruntime or \
         ORT_DYLIB_PATH",
    )
}

fn libraries(found: &MachineFindings, major: i32) -> Finding {
    let provider = match &found.cuda {
        Some(provider) if provider.is_whole() => provider,
        _ => {
            let text = "unknown without the CUDA provider, which is linked with the libraries";
            return Finding::Bad(text.to_owned(), None);
        }
    };
    if let Some(reason) = &provider.lost {
        return Finding::bad(
            format!("loading the libraries that the provider is linked with: {reason}"),
            "reinstall CUDA's libraries, or remove other versions of them from LD_LIBRARY_PATH",
        );
    }
    let (missing, there): (Vec<&Needed>, Vec<&Needed>) = provider
        .needed
        .iter()
        .partition(|needed| needed.error.is_some());
    let names = |list: &[&Needed]| -> Vec<String> {
        list.iter().map(|needed| needed.name.clone()).collect()
    };
    if missing.is_empty() {
        return Finding::Fine(format!("CUDA {major}: {}", names(&there).join(", ")));
    }
    // The error of a library that exists and cannot be loaded is shown, too.
    let stories = missing.iter().filter_map(|needed| needed.error.as_deref());
    let stories: Vec<&str> = stories
        .filter(|story| !story.contains("No such file"))
        .collect();
    let stories = match stories.as_slice() {
        [] => String::new(),
        some => format!(" ({})", some.join("; ")),
    };
    let text = format!("{} missing{stories}", are(&names(&missing)));
    if let Some(folder) = &found.library.folder
        && missing.iter().all(|needed| needed.is_beside)
    {
        let folder = folder.display();
        return Finding::bad(
            text,
            format!(
                "add {folder} to LD_LIBRARY_PATH: the libraries are there, but the provider does \
                 not search its own directory"
            ),
        );
    }
    let mut wheels: Vec<String> = missing
        .iter()
        .filter_map(|needed| wheel(&needed.name, major))
        .collect();
    wheels.dedup();
    let get = match wheels.as_slice() {
        [] => format!("install CUDA {major}'s libraries"),
        wheels => format!("pip install {}", wheels.join(" ")),
    };
    // A worker looks into the packages of its ONNX Runtime's environment.
    if let Some(packages) = found.library.folder.as_deref().and_then(packages_around) {
        return Finding::bad(
            text,
            format!("{get} for the Python of {}", packages.display()),
        );
    }
    let folder = match major {
        ..13 => "site-packages/nvidia/*/lib".to_owned(),
        _ => format!("site-packages/nvidia/cu{major}/lib"),
    };
    Finding::bad(
        text,
        format!("{get}, and add the directory that contains them ({folder}) to LD_LIBRARY_PATH"),
    )
}

/// Returns the Python package of a CUDA library, as an argument of pip.
fn wheel(library: &str, cuda_major: i32) -> Option<String> {
    let (name, number) = library.split_once(".so.")?;
    let part = match name {
        "libcudart" => "cuda-runtime",
        "libcublas" | "libcublasLt" => "cublas",
        "libcurand" => "curand",
        "libcufft" => "cufft",
        "libnvrtc" => "cuda-nvrtc",
        "libcudnn" => return Some(format!("nvidia-cudnn-cu{cuda_major}")),
        _ => return None,
    };
    // Since CUDA 13, the names of packages do not contain the version.
    if cuda_major < 13 {
        return Some(format!("nvidia-{part}-cu{cuda_major}"));
    }
    let major = number.split('.').next()?;
    Some(format!("'nvidia-{part}=={major}.*'"))
}

/// Formats names as "a is", or "a, b and c are".
fn are<T: AsRef<str>>(names: &[T]) -> String {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.as_slice() {
        [] => "none are".to_owned(),
        [one] => format!("{one} is"),
        [others @ .., last] => format!("{} and {last} are", others.join(", ")),
    }
}
