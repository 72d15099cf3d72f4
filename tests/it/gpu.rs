//! Reports of the worker and the doctor about GPUs, with a fake driver: two
//! small libraries in C that answer as NVIDIA's would, compiled by the C
//! compiler that Rust links with. The results are made up, but the tests check
//! that the functions are called as declared and that every result is reported
//! in the right place.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use imagegpt::engine::fake::Script;
use imagegpt::gpu::kernels::{Half, Numbers, quick_gelu};
use imagegpt::proto::pb;
use imagegpt::runtime;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{self, model_dir, until};
use crate::process;

const WHOLE: &str = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f";
const PART: &str = "MIG-10111213-1415-1617-1819-1a1b1c1d1e1f";

/// Returns the directory with the libraries, which is made once.
fn driver() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| compile(None)).path()
}

/// Compiles the libraries, optionally with a macro that breaks them.
fn compile(broken: Option<&str>) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (source, library) in [("cuda.c", "libcuda.so.1"), ("nvml.c", "libnvidia-ml.so.1")] {
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-Wall", "-Werror"])
            .args(broken.map(|name| format!("-D{name}")))
            .arg(format!("-Wl,-soname,{library}"))
            .arg("-o")
            .arg(folder.path().join(library))
            .arg(sources().join(source))
            .arg("-lm")
            .status();
        assert!(status.expect("a C compiler").success(), "{source}");
    }
    folder
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/driver")
}

fn doctor(arguments: &[&str]) -> Value {
    doctor_with(driver(), arguments)
}

fn doctor_with(driver: &Path, arguments: &[&str]) -> Value {
    let output = process::program()
        .args(["doctor", "--format", "json"])
        .args(arguments)
        .env(
            "ORT_DYLIB_PATH",
            imagegpt::runtime::library::find_library(None),
        )
        .env("LD_LIBRARY_PATH", driver)
        .env("CUDA_VISIBLE_DEVICES", "1,MIG-10111213")
        .output()
        .expect("the program runs");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn check(report: &Value, name: &str) -> Value {
    let checks = report["checks"].as_array().expect("checks");
    let check = checks.iter().find(|check| check["name"] == name);
    check.expect("a check").clone()
}

#[test]
fn the_doctor_sees_the_devices_that_cuda_shows() {
    let report = doctor(&["--device-id", "0,1"]);
    let whole = json!({
        "id": 0,
        "name": "Fake GPU",
        "uuid": WHOLE,
        "memory_bytes": 80_u64 << 30,
        "compute_capability": "9.0",
        "memory": {"used_bytes": 8_u64 << 30, "total_bytes": 80_u64 << 30},
        "utilization": 0.75,
        "power_watts": 350.0,
    });
    let part = json!({
        "id": 1,
        "name": "Fake GPU MIG 1g.10gb",
        "uuid": PART,
        "memory_bytes": 10_u64 << 30,
        "compute_capability": "9.0",
        "memory": {"used_bytes": 1_u64 << 30, "total_bytes": 10_u64 << 30},
        "utilization": null,
        "power_watts": null,
    });
    assert_eq!(report["gpus"], json!([whole, part]));
    assert_eq!(
        check(&report, "NVIDIA driver"),
        json!({
            "name": "NVIDIA driver",
            "result": "ok",
            "found": "version 580.82.07, for CUDA up to 13.2",
        })
    );
    assert_eq!(check(&report, "GPUs")["result"], "ok");
    // There is a GPU, so its provider is missed; auto serves without.
    assert_eq!(check(&report, "CUDA provider")["result"], "warning");
    assert_eq!(report["providers"], json!(["cpu"]));

    let report = doctor(&["--device-id", "2"]);
    let obstacle = report["obstacles"]["cuda"].as_str().expect("text");
    assert!(
        obstacle.starts_with(
            "there is no GPU 2; the number of GPUs that CUDA shows is 2 \
             (CUDA_VISIBLE_DEVICES=1,MIG-10111213): --device-id"
        ),
        "{obstacle}"
    );
}

#[test]
fn a_driver_that_hangs_or_aborts_is_a_line_of_the_report() {
    // Long enough for the other looks on a busy machine.
    let time = ["--look-timeout", "10s"];
    let hung = "there was no answer within 10s";
    let aborted = "ended with signal: 6 (SIGABRT)";
    let cases = [
        ("CUDA_HANGS", hung),
        ("CUDA_ABORTS", aborted),
        ("NVML_HANGS", hung),
        ("NVML_ABORTS", aborted),
    ];
    std::thread::scope(|scope| {
        for (broken, expected) in cases {
            scope.spawn(move || {
                let driver = compile(Some(broken));
                let report = doctor_with(driver.path(), &time);
                let line = check(&report, "NVIDIA driver");
                assert_eq!(line["result"], "warning", "{broken}: {report}");
                let found = line["found"].as_str().expect("text");
                assert!(found.contains(expected), "{broken}: {found}");
                let todo = line["todo"].as_str().expect("text");
                assert!(todo.contains("nvidia-smi"), "{broken}: {todo}");
                // The rest of the report is there.
                assert_eq!(report["providers"], json!(["cpu"]), "{broken}: {report}");
                assert_eq!(report["gpus"], json!([]));
                let trial = check(&report, "inference on cuda:0");
                assert_eq!(trial["found"], "not tried: see above");
            });
        }
    });
}

/// Loads the libraries into this process, which finds them by their bare names
/// from then on.
fn load() {
    for library in ["libcuda.so.1", "libnvidia-ml.so.1"] {
        runtime::load(&driver().join(library)).expect("loaded");
    }
}

#[test]
#[expect(unsafe_code, reason = "a kernel is given addresses")]
fn kernels_are_launched_as_declared() {
    load();
    for n in [1_u16, 8, 2048, 2049, 5000] {
        let x: Vec<half::bf16> = (0..n)
            .map(|idx| half::bf16::from_f32(f32::from(idx % 41) / 4.0 - 5.0))
            .collect();
        for half in [Half::Bf16, Half::Fp16] {
            let mut y = vec![half::bf16::NAN; x.len()];
            let numbers = Numbers {
                x: x.as_ptr().cast(),
                y: y.as_mut_ptr().cast(),
                n: x.len(),
            };
            // SAFETY: the driver is ours, and computes at once on memory like this.
            let outcome = unsafe { quick_gelu(half, numbers, 1.702, std::ptr::null_mut()) };
            outcome.expect("launched");
            for (x, y) in x.iter().zip(&y) {
                let x = x.to_f32();
                // Its kernel for fp16 copies.
                let expected = if half == Half::Fp16 {
                    x
                } else {
                    x / (1.0 + (-1.702 * x).exp())
                };
                assert!(
                    (y.to_f32() - expected).abs() <= expected.abs() / 100.0,
                    "{x}: {y}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_worker_on_a_gpu_says_which_and_how_it_is() {
    load();
    let factory = harness::altered(Script::default(), |engine| engine.facts.provider = "cuda");
    let flags = ["--device-id", "1"];
    let mut running = harness::start(&model_dir("micro"), &flags, Some(factory)).await;
    let series = format!(
        "imagegpt_gpu_memory_used_bytes{{device=\"1\"}} {}\n",
        1 << 30
    );
    let mut page = String::new();
    until(&running, &series, async || {
        page = running.metrics().await;
        page.contains(&series)
    })
    .await;
    assert!(page.contains("imagegpt_gpu_memory_total_bytes{device=\"1\"} 10737418240\n"));
    // A part of a GPU has no utilization, and the other device is not ours.
    assert!(!page.contains("imagegpt_gpu_utilization_ratio{"), "{page}");
    assert!(!page.contains("{device=\"0\"}"), "{page}");

    let model = running.client.get_model(pb::GetModelRequest {}).await;
    let expected = pb::Device {
        id: 1,
        execution_provider: "cuda".to_owned(),
        serving: true,
        name: "Fake GPU MIG 1g.10gb".to_owned(),
        uuid: PART.to_owned(),
        memory_bytes: 10 << 30,
        driver_version: "580.82.07".to_owned(),
        cuda_version: "13.2".to_owned(),
    };
    assert_eq!(model.expect("a model").into_inner().devices, [expected]);
    running.end().await;
}
