//! What a GPU's path shares with the CPU's: buffers that are bound once, also
//! those of a run that is captured.

use super::*;
use crate::engine::onnx::{environment, find_library};
use crate::engine::runtime::Residence;
use crate::job::Want;

const POSITIONS: usize = 64;

fn graph(captures: bool) -> WholeGraph {
    let environment = environment(&find_library(None)).expect("make setup has brought it");
    let runtime = Runtime {
        operators: None,
        n_threads: 1,
        residence: Residence::Packed,
        cuda_graphs: captures,
        ..Runtime::new(environment, Provider::Cpu).expect("a runtime")
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/micro/model.onnx");
    WholeGraph::open(&runtime, Graph::Hidden, &path, false).expect("a graph")
}

fn image(seed: u16) -> Vec<u16> {
    let tokens = 0..u16::try_from(POSITIONS).expect("few");
    tokens.map(|idx| (idx * 7 + seed * 13) % 16).collect()
}

/// Answers of images at a size.
fn run(graph: &mut WholeGraph, images: &[Vec<u16>], size: usize) -> Vec<Vec<f32>> {
    let rows: Vec<Row<'_>> = images
        .iter()
        .map(|tokens| Row {
            tokens,
            want: Want::Mean,
        })
        .collect();
    let run = Run {
        graph: Graph::Hidden,
        bucket: size,
        rows: &rows,
    };
    let batch = Batch {
        rows: &rows,
        size,
        positions: POSITIONS,
        start: None,
    };
    let options = graph.options(size).expect("options");
    graph.run(&run, batch, &options, &mut None).expect("a run")
}

fn near(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    a.len() == b.len() && pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-6)
}

#[test]
fn buffers_are_made_once_and_hold_each_batch_in_turn() {
    let images: Vec<Vec<u16>> = (0..4).map(image).collect();
    // The first run of a session is of no buffers.
    let expected: Vec<Vec<f32>> = images
        .iter()
        .map(|image| {
            let mut graph = graph(false);
            run(&mut graph, std::slice::from_ref(image), 1).remove(0)
        })
        .collect();
    assert!(!near(&expected[..1], &expected[1..2]), "images must differ");
    for captures in [false, true] {
        let mut graph = graph(captures);
        for round in 0..3 {
            assert!(near(&run(&mut graph, &images[..1], 1), &expected[..1]));
            assert!(near(&run(&mut graph, &images[1..3], 2), &expected[1..3]));
            // Less than the size is padded.
            assert!(near(&run(&mut graph, &images[1..4], 4), &expected[1..4]));
            assert!(near(&run(&mut graph, &images[3..], 2), &expected[3..]));
            assert_eq!(
                graph.bound.len(),
                if round == 0 { 2 } else { 3 },
                "{captures}"
            );
            if round == 0 {
                // The first was before its shape was known.
                assert!(!graph.bound.contains_key(&1));
            }
        }
    }
}

#[test]
fn captured_runs_have_a_name_for_each_size() {
    let mut graph = graph(true);
    let id = |graph: &WholeGraph, size| graph.options(size).expect("options").get(GRAPH_ID);
    assert_eq!(
        id(&graph, 4).as_deref(),
        Some(NO_GRAPH),
        "its shape is unknown"
    );
    run(&mut graph, &[image(0)], 1);
    assert_eq!(id(&graph, 4).as_deref(), Some("4"));
    assert_eq!(id(&graph, 1).as_deref(), Some("1"));
}

#[test]
fn all_nodes_are_where_they_should_be() {
    let graph = graph(false);
    let placement = placement::placement(&graph.session).expect("it was recorded");
    let of_cpu = &placement[Provider::Cpu.runtime_name()];
    assert_eq!(placement.len(), 1);
    assert!(of_cpu.values().sum::<usize>() > 10, "{of_cpu:?}");
    placement::check(&placement, Provider::Cpu, false).expect("all on the CPU");
    // The same graph would not do on a GPU that takes none of it.
    placement::check(&placement, Provider::Cuda, false).expect_err("nothing is on the GPU");
}
