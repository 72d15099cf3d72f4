use super::*;
use crate::commands::doctor::library::Needed;
use crate::commands::doctor::machine::{Cpu, MemoryLimits};
use crate::gpu::{Gpu, Gpus, MemoryUse, Version};
use crate::model::precision::Provider;

/// A machine that has everything: two H100s, CUDA 13, and ONNX Runtime for
/// CUDA.
fn complete() -> MachineFindings {
    let gpu = |id| Gpu {
        id,
        name: "NVIDIA H100 80GB HBM3".to_owned(),
        uuid: format!("GPU-{id}"),
        memory_bytes: 80 << 30,
        compute_capability: Version { major: 9, minor: 0 },
    };
    let needed = [
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libcurand.so.10",
        "libcudart.so.13",
    ];
    MachineFindings {
        machine: MachineLimits {
            cpu: Cpu {
                model: Some("Xeon".to_owned()),
                n_cpus: 8,
                n_allowed: Some(8),
                quota: None,
                flags: ["avx2", "fma"].map(str::to_owned).into(),
            },
            memory: MemoryLimits {
                total: Some(16 << 30),
                available: Some(8 << 30),
                limit: None,
            },
            huge_pages: Some("madvise".to_owned()),
            open_files_max: Some(1 << 20),
        },
        cache: CacheFinding {
            folder: Ok("/cache".into()),
            space: Ok(10 << 30),
        },
        library: Library {
            path: "/ort/libonnxruntime.so".into(),
            minor: Ok(31),
            folder: Some("/ort".into()),
        },
        cuda: Some(CudaProvider {
            missing_files: Vec::new(),
            needed: needed
                .map(|name| Needed {
                    name: name.to_owned(),
                    error: None,
                    is_beside: false,
                })
                .into(),
            unreadable: None,
            lost: None,
        }),
        gpus: Ok(DriverFindings {
            gpus: Gpus {
                devices: vec![gpu(0), gpu(1)],
                driver_version: Some("580.82.07".to_owned()),
                cuda_version: Some(Version {
                    major: 13,
                    minor: 0,
                }),
                absent: None,
            },
            usage: vec![(
                0,
                GpuUsage {
                    memory: Some(MemoryUse {
                        used_bytes: 1 << 30,
                        total_bytes: 80 << 30,
                    }),
                    ..GpuUsage::default()
                },
            )],
        }),
        visible_devices: None,
    }
}

/// The same machine without any software of NVIDIA.
fn without_gpu() -> MachineFindings {
    let mut found = complete();
    found.gpus = Ok(DriverFindings {
        gpus: Gpus {
            absent: Some("the NVIDIA driver's library cannot be loaded: libcuda.so.1".to_owned()),
            ..Gpus::default()
        },
        usage: Vec::new(),
    });
    found.cuda = Some(CudaProvider {
        missing_files: vec!["libonnxruntime_providers_cuda.so".to_owned()],
        ..CudaProvider::default()
    });
    found
}

fn gpus_of(found: &mut MachineFindings) -> &mut Gpus {
    &mut found.gpus.as_mut().unwrap().gpus
}

fn missing_library(name: &str, words: &str) -> MachineFindings {
    let mut found = complete();
    let provider = found.cuda.as_mut().unwrap();
    let needed = provider
        .needed
        .iter_mut()
        .find(|needed| needed.name == name);
    needed.unwrap().error = Some(words.to_owned());
    found
}

fn asked(provider: ProviderChoice, device_ids: &[i32]) -> Asked {
    Asked {
        provider,
        device_ids: device_ids.to_vec(),
    }
}

/// Judges a machine on which every trial passes; returns the trials, too.
fn judged(asked: &Asked, found: &MachineFindings) -> (DoctorReport, Vec<(Provider, i32)>) {
    let mut tried = Vec::new();
    let report = judge(asked, found, &mut |provider, id| {
        tried.push((provider, id));
        Tried::Passed("tiny".to_owned())
    });
    (report, tried)
}

fn check<'r>(report: &'r DoctorReport, name: &str) -> &'r Check {
    let mut checks = report.checks.iter();
    checks.find(|check| check.name == name).unwrap()
}

fn result(report: &DoctorReport, name: &str) -> CheckOutcome {
    check(report, name).result
}

const CPU: Provider = Provider::Cpu;
const CUDA: Provider = Provider::Cuda;

#[test]
fn a_machine_with_everything() {
    let (report, tried) = judged(&asked(ProviderChoice::Auto, &[0]), &complete());
    assert!(report.can_serve);
    assert_eq!(report.providers, ["cpu", "cuda"]);
    assert_eq!(tried, [(CPU, 0), (CUDA, 0)]);
    let is_ok = |check: &Check| check.result == CheckOutcome::Ok;
    assert!(report.checks.iter().all(is_ok), "{:?}", report.checks);
    let gpus = &check(&report, "GPUs").found;
    assert!(
        gpus.contains("0: NVIDIA H100 80GB HBM3, 80.0 GiB, 1.0 GiB in use"),
        "{gpus}"
    );
    assert_eq!(report.gpus.len(), 2);
}

#[test]
fn each_gpu_that_was_asked_for_is_tried_and_nothing_else() {
    let (report, tried) = judged(&asked(ProviderChoice::Cuda, &[1, 0]), &complete());
    assert_eq!(report.providers, ["cuda"]);
    assert_eq!(tried, [(CUDA, 1), (CUDA, 0)]);
    // One GPU that fails makes the whole provider fail.
    let report = judge(
        &asked(ProviderChoice::Cuda, &[0, 1]),
        &complete(),
        &mut |_, id| match id {
            0 => Tried::Passed("tiny".to_owned()),
            _ => Tried::Failed("CUDA failure 2: out of memory".to_owned()),
        },
    );
    assert!(!report.can_serve);
    assert_eq!(report.obstacles["cuda"], "CUDA failure 2: out of memory");
    assert_eq!(result(&report, "inference on cuda:0"), CheckOutcome::Ok);
    assert_eq!(result(&report, "inference on cuda:1"), CheckOutcome::Failed);
}

#[test]
fn without_a_gpu_auto_is_served_on_the_cpu_and_cuda_is_not() {
    let (report, tried) = judged(&asked(ProviderChoice::Auto, &[0]), &without_gpu());
    assert!(report.can_serve);
    assert_eq!(tried, [(CPU, 0)], "nothing is tried that cannot be");
    for name in ["NVIDIA driver", "GPUs", "CUDA provider", "CUDA libraries"] {
        assert_eq!(result(&report, name), CheckOutcome::NotNeeded, "{name}");
    }
    assert_eq!(
        result(&report, "inference on cuda:0"),
        CheckOutcome::NotNeeded
    );
    assert!(report.obstacles["cuda"].contains("driver 580 or newer"));

    let (report, tried) = judged(&asked(ProviderChoice::Cuda, &[0]), &without_gpu());
    assert!(!report.can_serve);
    assert_eq!(tried, []);
    assert_eq!(result(&report, "NVIDIA driver"), CheckOutcome::Failed);
    assert_eq!(result(&report, "CUDA provider"), CheckOutcome::Failed);
}

#[test]
fn a_missing_library_is_named_with_its_package() {
    let gone = "libcublas.so.13: cannot open shared object file: No such file or directory";
    let found = missing_library("libcublas.so.13", gone);
    let (report, _) = judged(&asked(ProviderChoice::Auto, &[0]), &found);
    assert_eq!(report.providers, ["cpu"]);
    // The machine has a GPU, so a user may want CUDA.
    assert_eq!(result(&report, "CUDA libraries"), CheckOutcome::Warning);
    let obstacle = &report.obstacles["cuda"];
    assert!(
        obstacle.starts_with("libcublas.so.13 is missing: pip install 'nvidia-cublas==13.*'"),
        "{obstacle}"
    );
    let (report, _) = judged(&asked(ProviderChoice::Cuda, &[0]), &found);
    assert_eq!(result(&report, "CUDA libraries"), CheckOutcome::Failed);

    // The library exists, but not where the provider looks.
    let mut found = found;
    for needed in &mut found.cuda.as_mut().unwrap().needed {
        needed.is_beside = true;
    }
    let (report, _) = judged(&asked(ProviderChoice::Cuda, &[0]), &found);
    let todo = check(&report, "CUDA libraries").todo.as_deref();
    assert_eq!(
        todo,
        Some(
            "add /ort to LD_LIBRARY_PATH: the libraries are there, but the provider does not search its own directory"
        )
    );

    // A library that exists and cannot be loaded is reported with the reason.
    let found = missing_library("libcurand.so.10", "libcurand.so.10: file too short");
    let (report, _) = judged(&asked(ProviderChoice::Cuda, &[0]), &found);
    let obstacle = &report.obstacles["cuda"];
    assert!(
        obstacle.contains("(libcurand.so.10: file too short)"),
        "{obstacle}"
    );
    assert!(obstacle.contains("'nvidia-curand==10.*'"), "{obstacle}");
}

#[test]
fn advice_for_a_python_environment_is_to_install_into_it() {
    let site = "/env/lib/python3.11/site-packages";
    let mut found = missing_library("libcublas.so.13", "No such file");
    found.library.folder = Some(format!("{site}/onnxruntime/capi").into());
    let todo = |found: &MachineFindings, name: &str| {
        let (report, _) = judged(&asked(ProviderChoice::Cuda, &[0]), found);
        check(&report, name).todo.clone().unwrap()
    };
    assert_eq!(
        todo(&found, "CUDA libraries"),
        format!("pip install 'nvidia-cublas==13.*' for the Python of {site}")
    );
    found.cuda = Some(CudaProvider {
        missing_files: vec!["libonnxruntime_providers_cuda.so".to_owned()],
        ..CudaProvider::default()
    });
    assert_eq!(
        todo(&found, "CUDA provider"),
        format!(
            "pip uninstall onnxruntime, and pip install 'imagegpt[gpu]', for the Python of {site}"
        )
    );
}

#[test]
fn packages_of_cuda_12_are_named_after_it() {
    let mut found = complete();
    let gone = Some("No such file".to_owned());
    found.cuda.as_mut().unwrap().needed =
        ["libcublasLt.so.12", "libcublas.so.12", "libcurand.so.10"]
            .map(|name| Needed {
                name: name.to_owned(),
                error: gone.clone(),
                is_beside: false,
            })
            .into();
    let (report, _) = judged(&asked(ProviderChoice::Cuda, &[0]), &found);
    let todo = check(&report, "CUDA libraries").todo.as_ref().unwrap();
    assert!(
        todo.starts_with("pip install nvidia-cublas-cu12 nvidia-curand-cu12,"),
        "{todo}"
    );
}

#[test]
fn an_old_driver() {
    let mut found = complete();
    gpus_of(&mut found).driver_version = Some("550.54.15".to_owned());
    gpus_of(&mut found).cuda_version = Some(Version {
        major: 12,
        minor: 4,
    });
    let (report, tried) = judged(&asked(ProviderChoice::Cuda, &[0]), &found);
    assert!(!report.can_serve);
    assert_eq!(tried, []);
    let driver = check(&report, "NVIDIA driver");
    assert_eq!(driver.found, "version 550.54.15, for CUDA up to 12.4");
    let todo = driver.todo.as_ref().unwrap();
    assert!(
        todo.contains("CUDA 13: install driver 580 or newer"),
        "{todo}"
    );
    assert_eq!(result(&report, "GPUs"), CheckOutcome::Ok);
}

#[test]
fn gpus_that_cannot_be_used() {
    let verdict = |found: &MachineFindings, ids: &[i32]| {
        let (report, _) = judged(&asked(ProviderChoice::Cuda, ids), found);
        let gpus = check(&report, "GPUs").clone();
        (report.can_serve, gpus)
    };
    let mut found = complete();
    found.visible_devices = Some("3,5".to_owned());
    let (can_serve, gpus) = verdict(&found, &[0, 2]);
    assert!(!can_serve);
    assert_eq!(
        gpus.found,
        "there is no GPU 2; the number of GPUs that CUDA shows is 2 (CUDA_VISIBLE_DEVICES=3,5)"
    );
    assert_eq!(gpus.todo.as_deref(), Some("--device-id counts from 0 to 1"));

    // The driver is there, but shows no devices.
    found.visible_devices = Some("-1".to_owned());
    gpus_of(&mut found).devices.clear();
    gpus_of(&mut found).absent =
        Some("cuInit failed: no CUDA-capable device is detected".to_owned());
    let (can_serve, gpus) = verdict(&found, &[0]);
    assert!(!can_serve);
    assert_eq!(
        gpus.found,
        "cuInit failed: no CUDA-capable device is detected (CUDA_VISIBLE_DEVICES=-1)"
    );

    // Another build may have kernels for this GPU, so only the trial can tell.
    let mut found = complete();
    gpus_of(&mut found).devices[1].compute_capability = Version {
        major: 10,
        minor: 0,
    };
    let (can_serve, gpus) = verdict(&found, &[1]);
    assert!(can_serve);
    assert_eq!(gpus.result, CheckOutcome::Warning);
    let todo = gpus.todo.unwrap();
    assert!(todo.contains("8.0 to 8.9, 9.0, 12.0; "), "{todo}");
    assert_eq!(verdict(&found, &[0]).1.result, CheckOutcome::Ok);
}

#[test]
fn a_driver_that_says_nothing_is_a_trouble_that_somebody_has() {
    let mut found = complete();
    found.gpus = Err("there was no answer within 1m".to_owned());
    let (report, tried) = judged(&asked(ProviderChoice::Auto, &[0]), &found);
    assert_eq!(report.providers, ["cpu"]);
    assert_eq!(tried, [(CPU, 0)], "what hung once is not tried");
    // The driver exists, so this is not a machine without a GPU.
    assert_eq!(result(&report, "NVIDIA driver"), CheckOutcome::Warning);
    let obstacle = &report.obstacles["cuda"];
    assert!(
        obstacle.contains("no answer within 1m: see whether nvidia-smi"),
        "{obstacle}"
    );
    let (report, _) = judged(&asked(ProviderChoice::Cuda, &[0]), &found);
    assert!(!report.can_serve);
    assert_eq!(result(&report, "NVIDIA driver"), CheckOutcome::Failed);
}

#[test]
fn a_provider_that_is_none_or_ends_its_process_is_told() {
    let mut found = complete();
    let provider = found.cuda.as_mut().unwrap();
    provider.unreadable = Some("/ort/x.so is not a library: junk".to_owned());
    let (report, tried) = judged(&asked(ProviderChoice::Cuda, &[0]), &found);
    assert!(!report.can_serve);
    assert_eq!(tried, []);
    assert_eq!(result(&report, "CUDA provider"), CheckOutcome::Failed);
    assert!(report.obstacles["cuda"].starts_with("/ort/x.so is not a library: junk: reinstall it"));

    found.cuda = Some(CudaProvider {
        lost: Some("the process that tried it ended with signal: 11".to_owned()),
        ..CudaProvider::default()
    });
    let (report, _) = judged(&asked(ProviderChoice::Cuda, &[0]), &found);
    assert_eq!(result(&report, "CUDA libraries"), CheckOutcome::Failed);
    assert!(report.obstacles["cuda"].contains("signal: 11"));
}

#[test]
fn without_onnx_runtime_nothing_serves() {
    let library = |minor: Result<u32, String>| {
        let mut found = complete();
        found.library.minor = minor;
        (found.library.folder, found.cuda) = (None, None);
        let (report, tried) = judged(&asked(ProviderChoice::Auto, &[0]), &found);
        assert!(!report.can_serve);
        assert_eq!(tried, []);
        assert_eq!(result(&report, "ONNX Runtime"), CheckOutcome::Failed);
        assert_eq!(result(&report, "inference on cpu"), CheckOutcome::Failed);
        report.obstacles["cpu"].clone()
    };
    let missing = library(Err("No such file or directory".to_owned()));
    assert!(missing.contains("pip install onnxruntime"), "{missing}");
    let old = library(Ok(MINOR_VERSION_MIN - 1));
    assert!(
        old.contains(&format!("version 1.{MINOR_VERSION_MIN} or newer")),
        "{old}"
    );
}

#[test]
fn a_trial_that_fails_is_a_warning_where_the_other_provider_serves() {
    let (auto, found) = (asked(ProviderChoice::Auto, &[0]), complete());
    let broken = |broken: Provider| {
        judge(&auto, &found, &mut |provider, _| {
            if provider == broken {
                Tried::Failed("ended with signal: 11".to_owned())
            } else {
                Tried::Passed("tiny".to_owned())
            }
        })
    };
    let report = broken(CUDA);
    assert_eq!(report.providers, ["cpu"]);
    assert_eq!(
        result(&report, "inference on cuda:0"),
        CheckOutcome::Warning
    );
    assert_eq!(report.obstacles["cuda"], "ended with signal: 11");
    let report = broken(CPU);
    assert_eq!(report.providers, ["cuda"]);
    assert_eq!(result(&report, "inference on cpu"), CheckOutcome::Warning);
}

#[test]
fn what_could_not_be_tried_is_believed_and_said() {
    let report = judge(
        &asked(ProviderChoice::Cpu, &[0]),
        &complete(),
        &mut |_, _| Tried::Untried("no place for a tiny model".to_owned()),
    );
    assert!(report.can_serve);
    let trial = check(&report, "inference on cpu");
    assert_eq!(trial.result, CheckOutcome::Warning);
    assert_eq!(trial.found, "not tried: no place for a tiny model");
    assert_eq!(trial.todo.as_deref(), Some("name a directory with --model"));
    assert_eq!(result(&report, "CUDA"), CheckOutcome::NotNeeded);
}

#[test]
fn a_small_machine_is_warned_of_and_serves() {
    let mut found = complete();
    found.machine = MachineLimits {
        cpu: Cpu {
            n_cpus: 4,
            quota: Some(0.5),
            ..Cpu::default()
        },
        memory: MemoryLimits {
            total: Some(16 << 30),
            available: None,
            limit: Some(512 << 20),
        },
        huge_pages: Some("never".to_owned()),
        open_files_max: Some(256),
    };
    found.cache.space = Ok(1 << 20);
    let (report, _) = judged(&asked(ProviderChoice::Cpu, &[0]), &found);
    assert!(report.can_serve);
    for name in [
        "CPU",
        "memory",
        "huge pages",
        "open files",
        "compiled models",
    ] {
        assert_eq!(result(&report, name), CheckOutcome::Warning, "{name}");
        assert!(check(&report, name).todo.is_some(), "{name}");
    }
    assert_eq!(
        check(&report, "CPU").found,
        "model unknown, 0.5 of 4 CPUs (cgroup limit 0.5); has none; lacks AVX2, AVX-512, VNNI, \
         BF16, AMX"
    );
    found.cache.space = Err("Read-only file system".to_owned());
    let (report, _) = judged(&asked(ProviderChoice::Cpu, &[0]), &found);
    let cache = &check(&report, "compiled models").found;
    assert_eq!(cache, "/cache cannot be written (Read-only file system)");
}
