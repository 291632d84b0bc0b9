/* The generic names that the port uses, mapped to those of this net. */
#ifndef NET_H
#define NET_H

#include "demo.h"

#define MO_NET_INPUTS DEMO_INPUTS
#define MO_NET_OUTPUTS DEMO_OUTPUTS
#define MO_NET_TARGETS DEMO_TARGETS
#define MO_NET_ARENA DEMO_ARENA
#define MO_NET_STATE DEMO_STATE
#define MO_NET_TRAINED DEMO_TRAINED
#define MO_NET_MEMBERS 0
#define MO_NET_PROTOTYPES 0

#define mo_net_t demo_t
#define mo_net_init demo_init
#define mo_net_input demo_input
#define mo_net_predict demo_predict
#define mo_net_train demo_train
#define mo_net_export_state demo_export_state
#define mo_net_import_state demo_import_state
#define mo_net_trained demo_trained
#define mo_net_error demo_error

#endif
