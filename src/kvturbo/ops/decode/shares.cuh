// How the row of all steps is cut into chunks; text that schedule.cu and decode.cu share.

#ifndef DEV
#define DEV __device__ __forceinline__
#endif
constexpr int SMALL_PER_CTA = 2;  // chunks that are drawn, at most

// Chunk c < ctas is CTA c's own, later ones are drawn. CTAs that share a multiprocessor have ranks 0, 1, ...: the first per_rank CTAs have
// rank 0, the next ones rank 1. A multiprocessor prefers the warps that came to it first, so each rank gets `taper` less than the one before.
struct Shares {
  int big, taper;  // places of a CTA of rank 0, and by how much fewer those of the next rank have
  int small;       // places of a drawn chunk
  int drawn;       // how many of them there are
  int per_rank, ctas;
  DEV int chunks() const { return (1 + SMALL_PER_CTA) * ctas; }  // at most
  // How much less the first `count` CTAs have together than if all had rank 0.
  DEV int tapered(int count) const {
    const int rank = count / per_rank, before = rank * per_rank;
    return (rank * (before - per_rank) / 2 + (count - before) * rank) * taper;
  }
  DEV int tapered() const { return tapered(ctas); }
  DEV int start(int chunk) const {
    const int own = min(chunk, ctas);
    return own * big - tapered(own) + (chunk - own) * small;
  }
  DEV int chunk_of(int place) const {
    int first = 0, size = big;  // of a rank
    while (first + per_rank < ctas && place >= per_rank * size) { place -= per_rank * size; first += per_rank; size -= taper; }
    const int own = min(per_rank, ctas - first);
    return place < own * size ? first + place / size : first + own + (place - own * size) / small;
  }
};
