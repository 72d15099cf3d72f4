//! Names that the inputs of a job give to their images, so that no two images
//! of different inputs have one id.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use super::identity::identity;
use super::location::Location;
use super::plan::{Shard, ShardKind};

/// Input of the command line, with the shards that it was divided into.
#[derive(Debug)]
pub(super) struct NamedInput {
    /// Directory to which the names of the images are relative.
    pub(super) base: Location,
    pub(super) shards: Range<usize>,
}

/// Returns the name below an input that stands before the ids of a tar's
/// images: the directories of the tar.
pub(super) fn above(name: &str) -> &str {
    name.rfind('/').map_or("", |slash| &name[..=slash])
}

/// Puts as many directories of each input before its ids as are needed to
/// distinguish the ids of different inputs. An input that shares no id with
/// another keeps the ids that it has alone.
///
/// # Errors
///
/// When the same data is named twice.
pub(super) fn distinguish(inputs: &[NamedInput], shards: &mut [Shard]) -> anyhow::Result<()> {
    if inputs.len() < 2 {
        return Ok(());
    }
    let mut depths = vec![0; inputs.len()];
    loop {
        let shared = shared(inputs, &depths, shards)?;
        let mut has_grown = false;
        for input in shared {
            if prefix(&inputs[input].base, depths[input])
                != prefix(&inputs[input].base, depths[input] + 1)
            {
                depths[input] += 1;
                has_grown = true;
            }
        }
        if !has_grown {
            break;
        }
    }
    for (input, depth) in inputs.iter().zip(depths) {
        let prefix = prefix(&input.base, depth);
        for shard in &mut shards[input.shards.clone()] {
            shard.id_base.insert_str(0, &prefix);
        }
    }
    Ok(())
}

/// Returns the last `depth` parts of a directory's location with a slash, or
/// the whole location if it has no more parts.
fn prefix(base: &Location, depth: usize) -> String {
    if depth == 0 {
        return String::new();
    }
    let text = base.to_string();
    let text = text.trim_end_matches('/');
    let mut slashes = text.rmatch_indices('/');
    match slashes.nth(depth - 1) {
        // Of a URL's root no part is left out.
        Some((slash, _))
            if !text[..slash].ends_with('/') && !text[slash + 1..].starts_with('/') =>
        {
            format!("{}/", &text[slash + 1..])
        }
        _ => format!("{text}/"),
    }
}

/// Returns the inputs that share an id with another input.
fn shared(
    inputs: &[NamedInput],
    depths: &[usize],
    shards: &[Shard],
) -> anyhow::Result<BTreeSet<usize>> {
    // Hashes instead of the ids: there may be as many as images. Two ids with
    // one hash would only be longer than they need to be.
    let mut seen: HashMap<u64, (usize, u64)> = HashMap::new();
    let mut shared = BTreeSet::new();
    for (idx, (input, depth)) in inputs.iter().zip(depths).enumerate() {
        let prefix = prefix(&input.base, *depth);
        let base = NamedBase::new(&input.base);
        for shard in &shards[input.shards.clone()] {
            for named in named(shard, &base) {
                let id = hash(&format!("{prefix}{}", named.id));
                let data = hash(&named.data);
                let (other, known) = *seen.entry(id).or_insert((idx, data));
                if other == idx {
                    continue;
                }
                if known != data {
                    shared.extend([idx, other]);
                } else if named.is_data {
                    anyhow::bail!(
                        "the inputs name {} twice, and its images would have the same ids twice; \
                         name it once",
                        named.data
                    );
                }
            }
        }
    }
    Ok(shared)
}

/// Id that stands for one image or for all images of a shard.
struct NamedData {
    id: String,
    /// Location of the data that has the id.
    data: String,
    /// True if the location is that of the data itself, which may not be named
    /// twice.
    is_data: bool,
}

/// Directory of an input, as its shards' names begin with it and under the one
/// name that all its spellings have.
struct NamedBase {
    spelled: String,
    identity: String,
}

impl NamedBase {
    fn new(base: &Location) -> Self {
        Self {
            spelled: base.to_string().trim_end_matches('/').to_owned(),
            identity: identity(base).trim_end_matches('/').to_owned(),
        }
    }

    /// Returns the location of a shard, the same for all spellings of the
    /// input.
    fn data(&self, shard: &Shard) -> String {
        match shard.name.strip_prefix(&self.spelled) {
            Some(below) => format!("{}{below}", self.identity),
            None => shard.name.clone(),
        }
    }
}

fn named<'a>(shard: &'a Shard, base: &'a NamedBase) -> Box<dyn Iterator<Item = NamedData> + 'a> {
    let one = |id: &str, data: String, is_data| NamedData {
        id: id.to_owned(),
        data,
        is_data,
    };
    match &shard.kind {
        ShardKind::Parquet(_) | ShardKind::Arrow(_) => {
            Box::new(std::iter::once(one(&shard.id_base, base.data(shard), true)))
        }
        // Keys of tars are known once they are read; those of one directory are
        // a dataset, whose keys are different. The tar itself may be there
        // once: no key has a NUL.
        ShardKind::WebDataset(_) => {
            let data = base.data(shard);
            let directory = above(&data).to_owned();
            let name = &data[directory.len()..];
            let tar = format!("{}{name}\0", shard.id_base);
            let keys = one(&shard.id_base, directory, false);
            Box::new([keys, one(&tar, data, true)].into_iter())
        }
        ShardKind::Lost(_) => Box::new(std::iter::empty()),
        ShardKind::Files { listing, range } => Box::new(range.clone().filter_map(move |idx| {
            let id = listing.relative_name(idx)?;
            Some(NamedData {
                data: format!("{}/{id}", base.identity),
                id: id.to_owned(),
                is_data: listing.is_tree(),
            })
        })),
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(paths: &[(&str, &str)]) -> anyhow::Result<Vec<String>> {
        let mut shards = Vec::new();
        let mut inputs = Vec::new();
        for (place, (base, name)) in paths.iter().enumerate() {
            let base = Location::Local(base.into());
            let location = base.join(name);
            shards.push(Shard {
                name: location.to_string(),
                bytes: 1,
                id_base: (*name).to_owned(),
                kind: ShardKind::Parquet(location),
            });
            inputs.push(NamedInput {
                base,
                shards: place..place + 1,
            });
        }
        distinguish(&inputs, &mut shards)?;
        Ok(shards.into_iter().map(|shard| shard.id_base).collect())
    }

    #[test]
    fn a_tar_of_a_directory_may_not_be_named_beside_it() {
        let of = |paths: &[(&str, &str)]| {
            let mut shards = Vec::new();
            let mut inputs = Vec::new();
            for (place, (base, name)) in paths.iter().enumerate() {
                let base = Location::Local(base.into());
                let location = base.join(name);
                shards.push(Shard {
                    name: location.to_string(),
                    bytes: 1,
                    id_base: above(name).to_owned(),
                    kind: ShardKind::WebDataset(location),
                });
                inputs.push(NamedInput {
                    base,
                    shards: place..place + 1,
                });
            }
            distinguish(&inputs, &mut shards)?;
            let bases = shards.into_iter().map(|shard| shard.id_base);
            anyhow::Ok(bases.collect::<Vec<_>>().join(" "))
        };
        assert_eq!(of(&[("/a", "0.tar"), ("/a", "1.tar")]).unwrap(), " ");
        assert_eq!(of(&[("/a", "0.tar"), ("/b", "0.tar")]).unwrap(), "a/ b/");
        for other in ["/a", "/a/", "/b/../a"] {
            let twice = of(&[("/a", "x/0.tar"), (other, "x/0.tar")]).unwrap_err();
            assert!(
                twice.to_string().contains("name /a/x/0.tar twice"),
                "{twice}"
            );
        }
    }

    #[test]
    fn inputs_are_told_apart_by_as_few_directories_as_possible() {
        let of = |paths| tables(paths).unwrap().join(" ");
        assert_eq!(of(&[("/a", "0"), ("/a", "1")]), "0 1");
        assert_eq!(of(&[("/a", "0"), ("/b", "0"), ("/c", "1")]), "a/0 b/0 1");
        assert_eq!(of(&[("/a/x", "0"), ("/b/x", "0")]), "a/x/0 b/x/0");
        assert_eq!(of(&[("/x", "0"), ("/b/x", "0")]), "/x/0 b/x/0");
        assert_eq!(
            of(&[("/a", "b/0"), ("/b", "0"), ("/c", "0")]),
            "a/b/0 /b/0 c/0"
        );
        let twice = tables(&[("/a", "0"), ("/a", "0")]).unwrap_err();
        assert!(twice.to_string().contains("name /a/0 twice"), "{twice}");
    }
}
