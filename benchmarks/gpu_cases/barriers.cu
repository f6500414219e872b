// What a barrier costs: nothing happens between two of them. Compiled with device.cuh before it, as the kernels are.

extern "C" __global__ void grid_rounds(unsigned* barrier, int rounds) {
    for (int round = 0; round < rounds; ++round) kr_grid_sync(barrier);
}

KR_CLUSTER_KERNEL cluster_rounds(int* last, int rounds) {
    for (int round = 0; round < rounds; ++round) kr_cluster_sync();
    if (threadIdx.x == 0 && kr_cluster_rank() == 0) *last = rounds;
}
