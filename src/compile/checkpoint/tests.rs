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
    refused(
        folder(&[(name, outside)]).path(),
        "not a file in the same directory",
    );
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
    refused(bin(b"hello, world").path(), "not written by torch.save");
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
    refused(b"\x80\x02R", "empty stack");
    refused(b"\x80\x02}q\x00h\x00.", "twice");
    refused(b"\x80\x02h\x07.", "never remembered");
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

/// Tensor of a state dict, as it is pickled.
struct Pickled<'a> {
    name: &'a str,
    storage: &'a str,
    shape: &'a [i64],
    strides: &'a [i64],
}

fn pickled(tensors: &[Pickled<'_>]) -> Vec<u8> {
    let mut program = b"\x80\x02}(".to_vec();
    let text = |program: &mut Vec<u8>, text: &str| {
        program.push(b'X');
        program.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
        program.extend(text.as_bytes());
    };
    let number = |program: &mut Vec<u8>, number: i64| {
        program.extend([0x8a, 8]);
        program.extend(number.to_le_bytes());
    };
    for tensor in tensors {
        text(&mut program, tensor.name);
        program.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut program, "storage");
        program.extend(b"ctorch\nFloatStorage\n");
        text(&mut program, tensor.storage);
        text(&mut program, "cpu");
        program.extend(b"K\x01tQK\x00");
        for sizes in [tensor.shape, tensor.strides] {
            program.push(b'(');
            for size in sizes {
                number(&mut program, *size);
            }
            program.push(b't');
        }
        program.extend(b"tR");
    }
    program.extend(b"u.");
    program
}

fn archive(program: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
    use std::io::Write as _;
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    archive.start_file("archive/data.pkl", options).unwrap();
    archive.write_all(program).unwrap();
    for (name, bytes) in storages {
        archive
            .start_file(format!("archive/data/{name}"), options)
            .unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn torch_of(tensors: &[Pickled<'_>], storages: &[(&str, &[u8])]) -> TempDir {
    folder(&[("pytorch_model.bin", &archive(&pickled(tensors), storages))])
}

#[test]
fn more_elements_than_are_stored_are_refused() {
    let of = |shape: &[i64], strides: &[i64]| {
        let tensor = Pickled {
            name: "w",
            storage: "0",
            shape,
            strides,
        };
        torch_of(&[tensor], &[("0", &[0; 24])])
    };
    let whole = of(&[3, 2], &[2, 1]);
    let checkpoint = Checkpoint::open(whole.path()).unwrap();
    assert_eq!(checkpoint.read("w", &[3, 2]).unwrap(), [0.0; 6]);
    let refused = |shape: &[i64], strides: &[i64], word: &str| {
        refused(of(shape, strides).path(), word);
    };
    let million = 1 << 20;
    refused(
        &[million, million],
        &[0, 0],
        "elements share 1 stored elements",
    );
    refused(
        &[million, 2],
        &[0, 1],
        "2097152 elements share 2 stored elements",
    );
    // Rows that lie over each other.
    refused(&[3, 3], &[1, 1], "9 elements share 5 stored elements");
    refused(&[3, 3], &[3, 1], "reaches beyond its storage");
    refused(
        &[million, million, 2],
        &[1, 1, 1],
        "limit of 1099511627776 elements",
    );
    refused(&[-1], &[1], "a size of -1");
    refused(&[1; 9], &[1; 9], "strides that do not fit");
}

#[test]
fn a_storage_is_not_shared_by_more_than_tied_weights() {
    let names: Vec<String> = (0..200).map(|idx| format!("w{idx}")).collect();
    let tensors = |n: usize| -> Vec<Pickled<'_>> {
        let names = names.iter().take(n);
        let tensor = |name| Pickled {
            name,
            storage: "0",
            shape: &[50_000],
            strides: &[1],
        };
        names.map(|name| tensor(name.as_str())).collect()
    };
    let storage = vec![0; 200_000];
    let tied = torch_of(&tensors(2), &[("0", &storage)]);
    assert!(Checkpoint::open(tied.path()).is_ok());
    let many = torch_of(&tensors(200), &[("0", &storage)]);
    refused(many.path(), "more of them share their storage");
}

#[test]
fn archives_that_lie_are_refused() {
    let bin = |bytes: &[u8]| folder(&[("pytorch_model.bin", bytes)]);
    let tensor = || Pickled {
        name: "w",
        storage: "0",
        shape: &[1 << 28],
        strides: &[1],
    };
    let whole = archive(&pickled(&[tensor()]), &[("0", &[0; 24])]);
    refused(bin(&whole).path(), "reaches beyond its storage");
    // The directory says that the storage is of a gigabyte.
    let entry = whole
        .windows(4)
        .rposition(|bytes| bytes == b"PK\x01\x02")
        .unwrap();
    let mut lying = whole.clone();
    for at in [entry + 20, entry + 24] {
        lying[at..at + 4].copy_from_slice(&(1_u32 << 30).to_le_bytes());
    }
    refused(bin(&lying).path(), "beyond its storage");
    // A pickle of 64 MiB, of numbers and of remembered texts.
    let long = [b"\x80\x02".to_vec(), vec![b'N'; 64 << 20]].concat();
    refused(
        bin(&archive(&long, &[])).path(),
        "data.pkl of over 1048576 bytes",
    );
    // More entries than any checkpoint has.
    let names: Vec<String> = (0..160_000).map(|idx| idx.to_string()).collect();
    let entries: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, &[][..])).collect();
    refused(bin(&archive(b"}.", &entries)).path(), "over 8388608 bytes");
}

#[test]
fn pickles_are_bounded() {
    #[track_caller]
    fn refused(program: &[u8], word: &str) {
        let error = pickle::state_dict(program).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    let many = |operations: &[u8]| {
        let mut program = b"\x80\x02".to_vec();
        while program.len() < 1 << 20 {
            program.extend(operations);
        }
        program
    };
    refused(&many(b"N"), "more than 200000 values");
    refused(&many(b")"), "more than 200000 values");
    refused(&many(b"K\x00\x94"), "more than 200000 values");
    // What is made again and again is there once.
    refused(&many(b"N\x940"), "0x30");
    // A long name of a storage, under many names of tensors.
    let storage = "s".repeat(1 << 19);
    let one = [Pickled {
        name: "w",
        storage: &storage,
        shape: &[1],
        strides: &[1],
    }];
    let mut program = pickled(&one);
    program.truncate(program.len() - 2);
    program.extend(b"q\x07");
    for idx in 0..30_000_u32 {
        program.extend(b"X\x04\x00\x00\x00");
        program.extend(format!("{idx:04x}").as_bytes().get(..4).unwrap());
        program.extend(b"h\x07");
    }
    program.extend(b"u.");
    let tensors = pickle::state_dict(&program).unwrap();
    assert!(tensors.len() > 1000);
}

#[test]
fn headers_that_lie_are_refused() {
    let file = |length: u64, header: &str, data: usize| {
        let bytes = [&length.to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
        folder(&[("model.safetensors", &bytes)])
    };
    let of = |header: &str, data| file(header.len() as u64, header, data);
    refused(
        file(100_000_000, "{}", 10).path(),
        "header would have 100000000 bytes; the limit is",
    );
    refused(file(u64::MAX, "{}", 10).path(), "header would have");
    refused(file(4 << 20, "{}", 10).path(), "truncated in its header");
    let tensor = |name: &str, shape: &str, from: u64, to: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let overlapping = [tensor("a", "[2]", 0, 8), tensor("b", "[2]", 4, 12)].join(",");
    refused(
        of(&format!("{{{overlapping}}}"), 12).path(),
        "not a safetensors file",
    );
    let huge = tensor("a", "[4294967296,4294967296,4294967296]", 0, 8);
    refused(
        of(&format!("{{{huge}}}"), 8).path(),
        "not a safetensors file",
    );
    let beyond = tensor("a", "[2305843009213693951]", 0, 9_223_372_036_854_775_804);
    refused(
        of(&format!("{{{beyond}}}"), 8).path(),
        "not a safetensors file",
    );
    // Nothing, in a shape whose strides no number holds.
    let nothing = tensor("a", "[0,9223372036854775807,9223372036854775807]", 0, 0);
    let nothing = of(&format!("{{{nothing}}}"), 0);
    let checkpoint = Checkpoint::open(nothing.path()).unwrap();
    let shape = [0, usize::MAX / 2, usize::MAX / 2];
    assert_eq!(checkpoint.read("a", &shape).unwrap(), [0.0; 0]);
}

#[test]
fn configurations_of_any_size_are_refused() {
    let long = format!("{{\"a\": \"{}\"}}", "a".repeat(5 << 20));
    let index = folder(&[("model.safetensors.index.json", long.as_bytes())]);
    refused(index.path(), "over 4194304 bytes");
    let config = folder(&[("config.json", long.as_bytes())]);
    let error = crate::model::architecture::Architecture::read(config.path()).unwrap_err();
    assert!(error.to_string().contains("over 4194304 bytes"), "{error}");
    let names: Vec<String> = (0..300)
        .map(|idx| format!("\"{idx}\":\"{idx}.bin\""))
        .collect();
    let index = format!("{{\"weight_map\":{{{}}}}}", names.join(","));
    let many = folder(&[("pytorch_model.bin.index.json", index.as_bytes())]);
    refused(many.path(), "more than 256 files");
    for outside in ["/etc/passwd", "..", "a/../../b", "..\\\\b", ""] {
        let index = format!("{{\"weight_map\":{{\"a\":\"{outside}\"}}}}");
        let outside = folder(&[("model.safetensors.index.json", index.as_bytes())]);
        refused(outside.path(), "not a file in the same directory");
    }
}

#[test]
fn names_of_wrapped_modules_are_read() {
    let bytes: Vec<u8> = [1.0_f32, -2.5]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let saved = |names: &[&str]| {
        let view = || TensorView::new(Dtype::F32, vec![1, 2], &bytes).unwrap();
        let tensors = names.iter().map(|name| (*name, view()));
        folder(&[("model.safetensors", &serialize(tensors, None).unwrap())])
    };
    for name in [
        "transformer.h.0.ln_1.weight",
        "module.transformer.h.0.ln_1.weight",
        "_orig_mod.transformer.h.0.ln_1.weight",
        "module._orig_mod.transformer.h.0.ln_1.weight",
        "_orig_mod.module.transformer.h.0.ln_1.weight",
        "module.module.transformer.h.0.ln_1.weight",
        "transformer._orig_mod.h.0.ln_1.weight",
        "module.transformer.h.0._orig_mod.ln_1.weight",
        "_fsdp_wrapped_module.transformer.h.0._fsdp_wrapped_module.ln_1.weight",
        "transformer.h.0._checkpoint_wrapped_module.ln_1.weight",
    ] {
        let folder = saved(&[name]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let read = checkpoint.read("transformer.h.0.ln_1.weight", &[1, 2]);
        assert_eq!(read.unwrap(), [1.0, -2.5], "{name}");
    }
    // A part of a name is no wrapper.
    let folder = saved(&["modules.wte.weight"]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.shape("wte.weight").is_none());
    // Two tensors of one name would leave the choice to chance.
    refused(
        saved(&["wte.weight", "module.wte.weight"]).path(),
        "remove one of them",
    );
}
