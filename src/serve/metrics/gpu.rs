//! Metrics of the GPUs that the model runs on. Only a worker that uses CUDA has
//! them: zero bytes of a GPU that is not there would be an answer, and wrong.

use metrics::{Key, Label, Recorder as _};

use super::{Metrics, Registry};
use crate::gpu::GpuUsage;

const MEMORY_USED: &str = "imagegpt_gpu_memory_used_bytes";
const MEMORY_TOTAL: &str = "imagegpt_gpu_memory_total_bytes";
const UTILIZATION: &str = "imagegpt_gpu_utilization_ratio";

pub(super) const GAUGES: [(&str, &str); 3] = [
    (
        MEMORY_USED,
        "Memory of the GPU that is in use, by whomever.",
    ),
    (MEMORY_TOTAL, "Memory of the GPU."),
    (
        UTILIZATION,
        "Share of the last moments in which the GPU was computing.",
    ),
];

impl Metrics {
    /// How the GPU that --device-id calls `id` is now; what it does not tell has
    /// no series.
    pub fn gpu(&self, id: i32, usage: GpuUsage) {
        let label = Label::new("device", id.to_string());
        let set = |name: &'static str, value: Option<f64>| {
            if let Some(value) = value {
                let key = Key::from_parts(name, vec![label.clone()]);
                let recorder = &self.0.recorder;
                recorder
                    .register_gauge(&key, &Registry::METADATA)
                    .set(value);
            }
        };
        set(
            MEMORY_USED,
            usage.memory.map(|memory| bytes(memory.used_bytes)),
        );
        set(
            MEMORY_TOTAL,
            usage.memory.map(|memory| bytes(memory.total_bytes)),
        );
        set(UTILIZATION, usage.utilization);
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "memory of a GPU stays far below 2^52 bytes"
)]
fn bytes(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::MemoryUse;

    #[test]
    fn series_appear_with_their_first_value() {
        let metrics = Metrics::new().unwrap();
        assert!(!metrics.render().contains("imagegpt_gpu"));
        let memory = Some(MemoryUse {
            used_bytes: 5,
            total_bytes: 80,
        });
        let whole = GpuUsage {
            memory,
            utilization: Some(0.5),
            power_watts: None,
        };
        metrics.gpu(0, whole);
        // A part of a GPU has no utilization.
        let part = GpuUsage {
            memory,
            ..GpuUsage::default()
        };
        metrics.gpu(3, part);
        let page = metrics.render();
        for line in [
            "imagegpt_gpu_memory_used_bytes{device=\"0\"} 5",
            "imagegpt_gpu_memory_total_bytes{device=\"3\"} 80",
            "imagegpt_gpu_utilization_ratio{device=\"0\"} 0.5",
        ] {
            assert!(page.lines().any(|seen| seen == line), "{line}: {page}");
        }
        assert!(!page.contains("imagegpt_gpu_utilization_ratio{device=\"3\"}"));
    }
}
