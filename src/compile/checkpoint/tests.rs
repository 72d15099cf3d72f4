use std::fs;
use std::path::Path;

use ::safetensors::tensor::{Dtype, TensorView, serialize};
use tempfile::TempDir;

use super::*;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/torch")
        .join(name)
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn tensors() -> Vec<u8> {
    let floats: Vec<u8> = [1.0_f32, -2.5]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let halves: Vec<u8> = [0x3c00_u16, 0xc100]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let brains: Vec<u8> = [0x3f80_u16, 0xc020]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let view = |dtype, bytes| TensorView::new(dtype, vec![1, 2], bytes).unwrap();
    let tensors = [
        ("single", view(Dtype::F32, &floats)),
        ("half", view(Dtype::F16, &halves)),
        ("brain", view(Dtype::BF16, &brains)),
        ("mask", view(Dtype::BOOL, &[1, 0])),
    ];
    serialize(tensors, None).unwrap()
}

#[track_caller]
fn refused(folder: &Path, word: &str) {
    let error = Checkpoint::open(folder).unwrap_err().to_string();
    assert!(error.contains(word), "{error}");
}

#[test]
fn every_kind_of_float_is_read() {
    let folder = folder(&[("model.safetensors", &tensors())]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for name in ["single", "half", "brain"] {
        assert_eq!(
            checkpoint.read(name, &[1, 2]).unwrap(),
            [1.0, -2.5],
            "{name}"
        );
    }
    let refused = |name, shape: &[usize], word: &str| {
        let error = checkpoint.read(name, shape).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    refused("mask", &[1, 2], "not in f16");
    refused("single", &[2, 1], "shape [1, 2]");
    refused("absent", &[2], "no tensor absent");
}

#[test]
fn shards_are_found_by_their_index() {
    let index = br#"{"weight_map": {"single": "a.safetensors", "half": "a.safetensors"}}"#;
    let name = "model.safetensors.index.json";
    let bytes = tensors();
    let whole = folder(&[(name, index), ("a.safetensors", &bytes)]);
    let checkpoint = Checkpoint::open(whole.path()).unwrap();
    assert_eq!(checkpoint.read("half", &[1, 2]).unwrap(), [1.0, -2.5]);
    refused(folder(&[(name, index)]).path(), "a.safetensors");
    let outside = br#"{"weight_map": {"single": "../a.safetensors"}}"#;
    refused(folder(&[(name, outside)]).path(), "no file beside it");
    refused(folder(&[(name, b"{}")]).path(), "no weight_map");
}

#[test]
fn broken_safetensors_are_refused() {
    let bytes = tensors();
    for n_bytes in [0, 4, 20, bytes.len() - 1] {
        let folder = folder(&[("model.safetensors", &bytes[..n_bytes])]);
        refused(folder.path(), "truncated");
    }
    let huge = folder(&[("model.safetensors", &[0xff; 32])]);
    refused(huge.path(), "not a safetensors file");
    refused(folder(&[]).path(), "no weights");
}

#[test]
fn torch_files_are_read_without_running_them() {
    let bytes = fs::read(data("pytorch_model.bin")).unwrap();
    let folder = folder(&[("pytorch_model.bin", &bytes)]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    // Transposed in the file.
    let head = checkpoint.read("lm_head.weight", &[5, 8]).unwrap();
    assert_eq!(head[..4], [0.9375, 0.375, 0.625, -0.0625]);
    assert!((head[39] + 0.1875).abs() < 1e-9);
    let halves = checkpoint
        .read("transformer.h.0.attn.c_attn.weight", &[8, 24])
        .unwrap();
    assert_eq!(halves[189..], [-1.0, -0.9375, 0.25]);
    assert!(
        checkpoint
            .read("transformer.h.0.attn.c_proj.bias", &[8])
            .is_ok()
    );
    assert!(checkpoint.read("transformer.h.0.ln_1.weight", &[8]).is_ok());
}

#[test]
fn other_torch_files_are_refused() {
    let bin = |bytes: &[u8]| folder(&[("pytorch_model.bin", bytes)]);
    let evil = bin(&fs::read(data("evil.bin")).unwrap());
    refused(evil.path(), "system, which is not run");
    assert!(!Path::new("/tmp/imagegpt-was-here").exists());
    refused(
        bin(&fs::read(data("legacy.bin")).unwrap()).path(),
        "before 1.6",
    );
    refused(bin(b"hello, world").path(), "not a file of torch.save");
    refused(bin(b"PK").path(), "truncated");
    let whole = fs::read(data("pytorch_model.bin")).unwrap();
    for n_bytes in (4..whole.len()).step_by(97) {
        assert!(Checkpoint::open(bin(&whole[..n_bytes]).path()).is_err());
    }
}

#[test]
fn hostile_pickles_are_refused() {
    #[track_caller]
    fn refused(program: &[u8], word: &str) {
        let error = pickle::state_dict(program).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    refused(b"", "truncated");
    refused(b"\x80\x02cos\nsystem\n.", "os.system");
    refused(
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        "builtins.eval",
    );
    refused(b"\x80\x02].", "not a dict");
    refused(b"\x80\x02R", "more than it has");
    refused(b"\x80\x02}q\x00h\x00.", "twice");
    refused(b"\x80\x02h\x07.", "never had");
    refused(b"\x80\x02i", "0x69");
    refused(b"\x80\x02X\xff\xff\xff\xffa", "truncated");
    // A million tuples, each in the next.
    let mut deep = b"\x80\x02)".to_vec();
    deep.resize(1_000_000, 0x85);
    refused(&deep, "tuples in tuples");
    // Any byte in place of any other, as far as it goes: never a panic.
    let program = b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x01\x00\x00\x00aK\x01u.";
    assert!(pickle::state_dict(program).unwrap().is_empty());
    for position in 0..program.len() {
        for byte in 0..=255 {
            let mut program = program.to_vec();
            program[position] = byte;
            let _ = pickle::state_dict(&program);
        }
    }
}

#[test]
fn strided_elements_are_put_in_order() {
    let values: Vec<f32> = (0..6_u8).map(f32::from).collect();
    assert_eq!(
        gather(values.clone(), &[3, 2], &[1, 3]),
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    );
    assert_eq!(gather(values.clone(), &[2, 3], &[3, 1]), values);
    assert_eq!(span(&[3, 2], &[1, 3]), 6);
    assert_eq!(span(&[0, 2], &[2, 1]), 0);
}
