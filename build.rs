//! Compiles `proto/` into Rust without protoc, and generates an enum of the
//! methods of its services.

use std::fmt::Write as _;
use std::path::PathBuf;

use prost_types::{FileDescriptorSet, MethodDescriptorProto};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["imagegpt/v1/imagegpt.proto", "inference/grpc_service.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(
        out_dir.join("imagegpt.fds"),
        prost::Message::encode_to_vec(&descriptors),
    )?;
    std::fs::write(out_dir.join("methods.rs"), methods(&descriptors)?)?;
    tonic_prost_build::configure()
        // Images and tensors are passed on as the bytes that were received.
        .bytes(".imagegpt.v1")
        .bytes(".inference")
        .codec_path("crate::proto::codec::ScanningCodec")
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        .compile_fds(descriptors)?;
    Ok(())
}

/// Generates an enum of the methods of all services, so that no list of methods
/// is written by hand.
fn methods(descriptors: &FileDescriptorSet) -> Result<String, std::fmt::Error> {
    let mut names = Vec::new();
    let (mut paths, mut client_streams, mut server_streams) =
        (String::new(), String::new(), String::new());
    let mut services = String::new();
    for file in &descriptors.file {
        for service in &file.service {
            let service_path = format!("/{}.{}/", file.package(), service.name());
            let methods = service.method.iter();
            let methods: Vec<&str> = methods.map(MethodDescriptorProto::name).collect();
            writeln!(services, "        ({service_path:?}, &{methods:?}),")?;
            for method in &service.method {
                let name = method.name();
                writeln!(
                    paths,
                    "            \"{service_path}{name}\" => Self::{name},"
                )?;
                if method.client_streaming() {
                    write!(client_streams, "Self::{name} | ")?;
                }
                if method.server_streaming() {
                    write!(server_streams, "Self::{name} | ")?;
                }
                names.push(name.to_owned());
            }
        }
    }
    let variants: String = names
        .iter()
        .fold(String::new(), |text, name| text + "    " + name + ",\n");
    let all: String = names
        .iter()
        .fold(String::new(), |text, name| text + "Self::" + name + ", ");
    let spelled: String = names.iter().fold(String::new(), |text, name| {
        text + &format!("            Self::{name} => {name:?},\n")
    });
    let (client_streams, server_streams) = (
        client_streams.trim_end_matches(" | "),
        server_streams.trim_end_matches(" | "),
    );
    let mut text = String::new();
    write!(
        text,
        "/// Method of one of the worker's gRPC services, which `proto/` defines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RpcMethod {{
{variants}    /// Unknown method of one of the services.
    Other,
}}

impl RpcMethod {{
    /// All methods, in the order of the enum.
    pub const ALL: [Self; {count}] = [{all}Self::Other];

    /// Path prefixes of the services, and the names of their methods.
    pub(crate) const SERVICES: &[(&str, &[&str])] = &[
{services}    ];

    /// Returns the name of the method, or `other`.
    #[must_use]
    pub const fn name(self) -> &'static str {{
        match self {{
{spelled}            Self::Other => \"other\",
        }}
    }}

    /// Returns the method of a request's path; `None` if the path belongs to
    /// none of the services.
    #[must_use]
    pub fn of_path(path: &str) -> Option<Self> {{
        let is_ours = |(service, _): &(&str, &[&str])| path.starts_with(*service);
        if !Self::SERVICES.iter().any(is_ours) {{
            return None;
        }}
        Some(match path {{
{paths}            _ => Self::Other,
        }})
    }}

    /// True if the client sends a stream of messages.
    #[must_use]
    pub const fn client_streams(self) -> bool {{
        matches!(self, {client_streams})
    }}

    /// True if the worker answers with a stream of messages.
    #[must_use]
    pub const fn server_streams(self) -> bool {{
        matches!(self, {server_streams})
    }}
}}
",
        count = names.len() + 1,
    )?;
    Ok(text)
}
