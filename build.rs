//! Compiles proto/ into Rust, without protoc.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["imagegpt/v1/imagegpt.proto", "inference/grpc_service.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(
        out_dir.join("imagegpt.fds"),
        prost::Message::encode_to_vec(&descriptors),
    )?;
    tonic_prost_build::configure()
        // Images and tensors are handed on as they came off the wire.
        .bytes(".imagegpt.v1")
        .bytes(".inference")
        .codec_path("crate::proto::codec::ScanningCodec")
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        .compile_fds(descriptors)?;
    Ok(())
}
